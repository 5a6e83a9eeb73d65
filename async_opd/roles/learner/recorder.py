"""A few trajectories of a step as the objective sees them, for people to look at."""

from dataclasses import replace

from torch import Tensor

from async_opd.core.recorded import RecordedTrajectory
from async_opd.objectives import Objective
from async_opd.objectives.effect import effect
from async_opd.objectives.token_batch import TokenBatch
from async_opd.roles.learner.batch import MicroBatch, Trajectory

TRAJECTORIES = 2  # of a recorded step
LONGEST = 2000  # tokens that are kept, of a prompt and of a response


class Recorder:
    """Looks at every micro-batch of this rank's step and keeps TRAJECTORIES of the student's,
    chosen by their keys alone, whatever their length or place."""

    def __init__(
        self,
        objective: Objective,
        trajectories: list[list[Trajectory]],
        micros: list[MicroBatch],
        live: int,
    ):
        """`trajectories` of each of `micros`; `live` version that they are trained at."""
        self._objective, self._live = objective, live
        self._trajectories = trajectories
        keys = [
            (key, number, place)
            for number, micro in enumerate(micros)
            if not micro.from_teacher
            for place, key in enumerate(micro.key_S.tolist())
        ]
        self._chosen = {(number, place) for _, number, place in sorted(keys)[:TRAJECTORIES]}
        self.recorded: list[RecordedTrajectory] = []

    def look(self, number: int, micro: MicroBatch, batch: TokenBatch) -> None:
        """Keep what is chosen of micro-batch `number`."""
        mine = self._trajectories[number]
        chosen = [place for place in range(len(mine)) if (number, place) in self._chosen]
        if chosen:
            columns = self._columns(micro, batch)
            self.recorded += [
                self._record(mine[place], columns, micro.segment_N == place) for place in chosen
            ]

    def _columns(self, micro: MicroBatch, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute [N] by name; where a position has several samples, of the one that was generated.
        The loss is taken once more, on leaves: DeepSpeed forbids to differentiate what its module
        gave by anything but its own backward."""
        leaves = replace(
            batch,
            student_logp_N=_leaf(batch.student_logp_N),
            student_logp_NK=_leaf(batch.student_logp_NK),
            student_tail_logp_N=_leaf(batch.student_tail_logp_N),
        )
        live = {
            "coefficient": leaves.student_logp_N,
            "candidate_coefficient": leaves.student_logp_NK,
            "tail_coefficient": leaves.student_tail_logp_N,
        }
        result = self._objective.loss(leaves)
        columns = {
            "version": self._live - micro.lag_N,
            "kv_lag": micro.kv_lag_N if micro.kv_lag_N.any() else None,
            # in the loss: no staler than the bound, and no truncated response where they are out
            "kept": micro.keep_N,
            "student": batch.student_logp_N,
            "behaviour": batch.behaviour_logp_N,
            "teacher": batch.teacher_logp_N,
            "reference": batch.reference_logp_N,
            "student_entropy": batch.student_entropy_N,
            "teacher_entropy": batch.teacher_entropy_N,
            **effect(result, live),
        }
        sampled = result.advantage is not None
        generated = {
            name: value[:, 0] if sampled and value.ndim == 2 else value
            for name, value in columns.items()
            if value is not None and name not in ("candidate_coefficient", "tail_coefficient")
        }
        return {name: value.detach() for name, value in generated.items() if value.ndim == 1}

    def _record(
        self, trajectory: Trajectory, columns: dict[str, Tensor], here_N: Tensor
    ) -> RecordedTrajectory:
        prompt, rollout = trajectory.prompt, trajectory.rollout
        theirs = None if prompt.teacher_ids is None else prompt.teacher_ids[-LONGEST:]
        return RecordedTrajectory(
            id=rollout.id,
            step=self._live + 1,
            prompt_ids=prompt.ids[-LONGEST:],
            ids=rollout.ids[:LONGEST],
            prompt_tokens=len(prompt.ids),
            tokens=len(rollout.ids),
            truncated=rollout.truncated,
            reward=next(v.reward for v in trajectory.verdicts if v.id == rollout.id),
            kept_kv=rollout.kept_kv,
            teacher_prompt_ids=theirs,
            teacher=prompt.teacher,
            numbers={k: v[here_N][:LONGEST].float().cpu().numpy() for k, v in columns.items()},
        )


def _leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_()
