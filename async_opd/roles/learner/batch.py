"""From groups and scores to packed micro-batches of tensors."""

import zlib
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from async_opd.core.errors import StaleTrajectory, WireError
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Prompt, Rollout, Scores, Verdict
from async_opd.maths import lag
from async_opd.objectives.token_batch import TokenBatch
from async_opd.roles.models.causal_lm import segments

# Scores of a group's rollouts, None for one that has none; None where the teacher has answered
Columns = tuple[Scores | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One trajectory as it reaches a learner rank."""

    prompt: Prompt
    rollout: Rollout
    scores: Scores | None  # None: the teacher's own answer
    verdicts: tuple[Verdict, ...]  # of all samples of the prompt, its own among them
    group_lengths: tuple[int, ...]  # tokens of those samples, in the order of the verdicts
    reference: Scores | None = None
    group: int = 0  # its number in the step

    @property
    def from_teacher(self) -> bool:
        """Whether the teacher has answered the prompt itself."""
        return self.scores is None


@dataclass(frozen=True, kw_only=True)
class TrainingBounds:
    """What bounds the training of a token: its lag, the length of its response, and what ended it.

    `stale` and `truncated` say "mask" where such tokens stay visible to the objective but leave the
    reduction.
    """

    max_lag_steps: int
    stale: Literal["mask", "drop"]
    truncated: Literal["train", "mask", "drop"]
    cap: int  # most tokens a response may have
    train_stop: bool = True  # false: the tokens of what stands in rollout.stop leave it too

    @classmethod
    def of(cls, settings: LearnerSettings) -> Self:
        """Take them from what a rank is built with."""
        return cls(
            max_lag_steps=settings.max_lag_steps,
            stale=settings.stale,
            truncated=settings.truncated,
            cap=settings.max_new_tokens,
            train_stop=settings.train_stop,
        )


def trajectories(
    share: LearnerShare,
    groups: tuple[Group, ...],
    scores: tuple[Columns, ...],
    references: tuple[Columns, ...] = (),
) -> list[list[Trajectory]]:
    """Pick the trajectories of each micro-batch of `share`; the rest is as in
    `LearnerRank.step`. Raises WireError for one that has no scores, or has failed by itself."""
    references = references or (None,) * len(groups)
    return [
        [
            Trajectory(
                prompt=groups[g].prompt,
                rollout=groups[g].rollouts[s],
                scores=_of(groups[g].rollouts[s], scores[g], s),
                verdicts=share.verdicts[g],
                group_lengths=tuple(len(rollout.ids) for rollout in groups[g].rollouts),
                reference=_of(groups[g].rollouts[s], references[g], s),
                group=share.number(g),
            )
            for g, s in micro
        ]
        for micro in share.micro_batches
    ]


def _of(rollout: Rollout, scores: Columns, sample: int) -> Scores | None:
    scored = scores[sample] if scores else None
    if rollout.failure or (scores and scored is None):
        raise WireError(f"{rollout.id}: it has no scores, and cannot be trained: {rollout.failure}")
    return scored


@dataclass(frozen=True, kw_only=True)
class MicroBatch(TokenBatch):
    """Trajectories packed along one row, response positions selected: `L` packed tokens, `N`
    response tokens. A token batch that the live student has not read yet."""

    ids_L: Tensor  # int64
    segment_lengths: list[int]  # prompt + response of each trajectory, summing to L
    rows_N: Tensor  # int64, index in L of the position that predicts each response token
    keep_N: Tensor  # bool, tokens inside the reduction
    kv_lag_N: Tensor  # float32, the same of the KV behind the weights of the token
    from_teacher: bool  # all of them the teacher's own answers: no lag, no scores, cross-entropy
    student_logp_N: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """Copy its tensors to `device`."""
        return replace(
            self, **{n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor)}
        )


def pack(
    trajectories: list[Trajectory], bounds: TrainingBounds, *, live: int, device: torch.device
) -> MicroBatch:
    """Pack `trajectories` (possibly none: such a micro-batch still joins every collective) under
    live version `live`.

    Raises StaleTrajectory for a token over the bound where the policy is "drop": the queue must not
    have let it by. Raises WireError where scores and rollout do not belong together, or answers of
    teacher and student come together.
    """
    from_teacher = any(t.from_teacher for t in trajectories)
    rollouts = [t.rollout for t in trajectories]
    scores = [_scores(t, from_teacher) for t in trajectories]
    versions = [np.full(len(r.ids), live) if from_teacher else r.versions() for r in rollouts]
    ids, rows = segments([(t.prompt.ids, t.rollout.ids) for t in trajectories])
    at_student_ids = not scores or scores[0].topk_ids is None
    return MicroBatch(
        ids_L=_flat(ids, torch.int64),
        segment_lengths=[len(part) for part in ids],
        rows_N=_flat(rows, torch.int64),
        targets_N=_flat([r.ids for r in rollouts], torch.int64),
        keep_N=_flat(
            [_kept(r, v, bounds, live) for r, v in zip(rollouts, versions, strict=True)],
            torch.bool,
        ),
        lag_N=_flat([live - v for v in versions], torch.int64),
        kv_lag_N=_flat(
            [_kv_lag(t, v) for t, v in zip(trajectories, versions, strict=True)], torch.float32
        ),
        segment_N=_flat([np.full(len(r.ids), i) for i, r in enumerate(rollouts)], torch.int64),
        behaviour_logp_N=_flat([r.behaviour_logp for r in rollouts], torch.float32),
        teacher_logp_N=_flat([s.sampled_logp for s in scores], torch.float32),
        key_S=torch.tensor([zlib.crc32(r.id.encode()) for r in rollouts], dtype=torch.int64),
        reward_S=torch.tensor(
            [_reward(v) for t in trajectories for v in t.verdicts if v.id == t.rollout.id]
        ),
        group_reward_SG=torch.tensor(
            [[_reward(v) for v in t.verdicts] for t in trajectories]
        ).reshape(len(rollouts), -1 if rollouts else 0),
        group_length_SG=torch.tensor(
            [t.group_lengths for t in trajectories], dtype=torch.float32
        ).reshape(len(rollouts), -1 if rollouts else 0),
        group_S=torch.tensor([t.group for t in trajectories], dtype=torch.int64),
        cap_S=torch.full((len(rollouts),), float(bounds.cap)),
        candidate_ids_NK=_flat_if_there(
            [r.candidate_ids for r in rollouts] if at_student_ids else [s.topk_ids for s in scores],
            torch.int64,
        ),
        behaviour_logp_NK=_flat_if_there([r.candidate_logp for r in rollouts]),
        teacher_logp_NK=_flat_if_there(
            [s.candidate_logp if at_student_ids else s.topk_logp for s in scores]
        ),
        teacher_tail_logp_N=_flat_if_there([s.tail_logp for s in scores]),
        teacher_entropy_N=_flat_if_there([s.entropy for s in scores]),
        reference_logp_N=_flat_if_there(
            [t.reference and t.reference.sampled_logp for t in trajectories]
        ),
        from_teacher=from_teacher,
    ).to(device)


def _scores(trajectory: Trajectory, from_teacher: bool) -> Scores:
    """Take the teacher's scores; of its own answer, what it was sampled with. Raises WireError
    where scores or verdicts are of another, and where it is not `from_teacher` as the others
    are."""
    rollout, reference = trajectory.rollout, trajectory.reference
    scores = trajectory.scores or Scores(id=rollout.id, sampled_logp=rollout.behaviour_logp)
    scored = {scores.id, reference.id if reference else scores.id}
    decided, rows = {v.id for v in trajectory.verdicts}, len(scores.sampled_logp)
    if scored != {rollout.id} or rollout.id not in decided or rows != len(rollout.ids):
        raise WireError(f"{rollout.id}: paired with {scored | decided}, {rows} scores")
    if trajectory.from_teacher != from_teacher:
        raise WireError(
            f"{rollout.id}: packed with answers of the {'teacher' if from_teacher else 'student'}"
        )
    return scores


def _kept(rollout: Rollout, version_T: np.ndarray, bounds: TrainingBounds, live: int) -> np.ndarray:
    """Find which tokens of `rollout` are inside the reduction. Raises StaleTrajectory."""
    fresh_T = lag.fresh(version_T, live, bounds.max_lag_steps)
    if bounds.stale == "drop" and not fresh_T.all():
        raise StaleTrajectory(
            f"{rollout.id}: {rollout.spans} at version {live}, bound {bounds.max_lag_steps}"
        )
    kept_T = fresh_T & (bounds.truncated != "mask" or not rollout.truncated)
    if rollout.stop_tokens and not bounds.train_stop:
        kept_T[-rollout.stop_tokens :] = False
    return kept_T


def _kv_lag(trajectory: Trajectory, version_T: np.ndarray) -> np.ndarray:
    """Compute the mean lag of what each token attended to: none where an update has the KV computed
    anew."""
    if trajectory.rollout.kept_kv:
        return lag.kv_lag(version_T, len(trajectory.prompt.ids))
    return np.zeros(len(version_T), np.float32)


def _flat(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0), dtype=dtype)


def _flat_if_there(
    parts: list[np.ndarray | None], dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Join what all trajectories have to one tensor; None where they have none."""
    return None if not parts or parts[0] is None else _flat([np.asarray(p) for p in parts], dtype)


def _reward(verdict: Verdict) -> float:
    return float("nan") if verdict.reward is None else verdict.reward
