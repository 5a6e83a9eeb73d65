"""Self-distillation in the direction of the verdict, gated by the teacher's entropy (EGRSD,
arXiv:2605.13255)."""

from typing import Annotated, ClassVar

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, gates, segments
from async_opd.objectives.modifiers import refuse_change
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch, declared

# Algorithm 1: A = r - 0.5 until the running moments mean something
WARMUP_STEPS, WARMUP_MEAN = 10, 0.5


class Egrsd(Sampled, frozen=True, tag="egrsd"):
    """A the trajectory's whitened reward, W = w · ω: w = clip(exp(sign(A) · (log π_T - log π)), 1 ±
    ε) the direction, ω = clip(1 - γ · H_T/max(max H_T, 1 nat), floor, 1) the teacher's certainty
    (Eq. 2-9, Algorithm 1; EXACT).

    γ = 0 is the baseline RLSD (arXiv:2604.03128). The paper's teacher is the frozen student with a
    reference solution in its context: `teacher.context`. RECONSTRUCTION: the largest entropy is
    over all ranks, and stale tokens get ρ̃, as the paper is on-policy. An unknown verdict gives no
    reward term, so no loss. A reward between 0 and 1 is taken as it is: sign(A) says whether it
    lies above the running mean. The running moments are those of every response, also one that left
    the loss, so `rollout.truncated = "drop"` is refused.
    """

    metrics: ClassVar = {
        "direction": (
            "factor",
            "the trajectory's reward against the running mean, mean over trained tokens",
        ),
        "certainty": ("factor", "the gate on the teacher's entropy, mean over trained tokens"),
    }

    gamma: Annotated[float, Meta(ge=0, le=1)] = 0.3
    clip: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    # β_L: a right answer of no length is worth 1 + β_L
    length_bonus: Annotated[float, Meta(ge=0)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor <= 1 - self.gamma:
            refuse_change(
                self, "floor", f"gamma = {self.gamma}, which leaves at least {1 - self.gamma:g}"
            )

    def requirements(self) -> Needs:
        """Ask for the teacher's exact entropy and its maximum over the step, unless γ = 0, and
        for the running moments of rewards."""
        maxima = ("teacher_entropy",) if self.gamma else ()
        return Needs(teacher_entropy=bool(maxima), maxima=maxima, running=("reward",))

    def token_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute H_T."""
        return {"teacher_entropy": declared(batch.teacher_entropy_N)} if self.gamma else {}

    def trajectory_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute the length-aware reward."""
        if not self.length_bonus:
            return {"reward": batch.reward_S}
        return {
            "reward": advantages.length_aware(
                batch.reward_S,
                segments.lengths(batch.segment_N, batch.trajectories),
                batch.cap_S,
                bonus=self.length_bonus,
            )
        }

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute the trajectory's advantage, [N]."""
        return advantages.whitened(
            self.trajectory_statistics(batch)["reward"],
            batch.running["reward"],
            step=batch.step,
            warmup_steps=WARMUP_STEPS,
            warmup_mean=WARMUP_MEAN,
        )[batch.segment_N]

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute w · ω [N]."""
        return self._direction(batch) * self._certainty(batch)

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute w and ω."""
        return {"direction": self._direction(batch), "certainty": self._certainty(batch)}

    def gated_entropy(self, batch: TokenBatch) -> Tensor:
        """Compute what the gate reads: H_T [N]."""
        return declared(batch.teacher_entropy_N)

    def _direction(self, batch: TokenBatch) -> Tensor:
        return gates.direction(
            self.teacher_minus_student(batch), self.advantage(batch).sign(), clip=self.clip
        )

    def _certainty(self, batch: TokenBatch) -> Tensor:
        if not self.gamma:
            return batch.behaviour_logp_N.new_ones(len(batch.behaviour_logp_N))
        return gates.certainty(
            self.gated_entropy(batch),
            batch.statistics["teacher_entropy"],
            gamma=self.gamma,
            floor=self.floor,
        )
