"""Divergence on the responses that verifier and teacher agree about (RG-OPD, arXiv:2607.04037)."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta
from msgspec.structs import replace

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, gates, segments
from async_opd.objectives.token_batch import TokenBatch, declared
from async_opd.objectives.topk_kl import TopkKl


class RgOpd(TopkKl, frozen=True, tag="rg_opd"):
    """Trains the responses with g = 1: the reward is above its group's mean and the teacher finds
    the response likelier than the student does, by more than d nats in sum; or it is not, and the
    teacher finds it less likely. The mean is over the tokens of those alone (Eq. 1-4; EXACT), the
    loss the reverse KL over the student's 50 likeliest tokens and a bucket for the rest (EXACT).

    RECONSTRUCTION: the live student's log-probs, detached; an unknown verdict gives g = 0; tokens
    that left the loss stay in the sums. On policy Σ_t A_t is negative in the mean, so that most
    right responses are dropped and most wrong ones kept, and all of a group of equal rewards whose
    sum is: `kept_right` and `kept_wrong`. With `signal_at_most` the sums are of what it leaves.
    """

    metrics: ClassVar = {
        "kept_right": ("share", "of the trained tokens of right responses that the gate keeps"),
        "kept_wrong": ("share", "of the trained tokens of wrong responses that the gate keeps"),
    }

    k: Annotated[int, Meta(ge=1)] = 50  # candidates a position
    support: Literal["teacher", "student"] = "student"
    margin: Annotated[float, Meta(ge=0)] = 0.0  # d, nats a response
    mean_over: Literal["tokens", "selected", "sequences"] = "selected"

    def requirements(self) -> Needs:
        """Ask for several samples of each prompt besides what the divergence asks for."""
        return replace(super().requirements(), groups=True)

    def selection(self, batch: TokenBatch) -> Tensor:
        """Choose the tokens of the responses that are kept, bool [N]."""
        gap_N, _ = self.bounded(
            advantages.reverse_kl(declared(batch.student_logp_N).detach(), batch.teacher_logp_N)
        )
        kept_S = gates.verdict_agrees(
            advantages.within_group(batch.reward_S, batch.group_reward_SG),
            segments.sums(gap_N, batch.segment_N, batch.trajectories),
            ~batch.reward_S.isnan(),
            margin=self.margin,
        )
        return kept_S[batch.segment_N]

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark what is kept of right and of wrong responses; NaN where the verdict is another."""
        reward_N = batch.reward_S[batch.segment_N]
        kept_N = self.selection(batch).to(reward_N.dtype)
        return {
            "kept_right": kept_N.where(reward_N == 1, float("nan")),
            "kept_wrong": kept_N.where(reward_N == 0, float("nan")),
        }
