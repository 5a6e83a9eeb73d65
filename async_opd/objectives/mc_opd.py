"""OPD over m samples a position instead of one (AsyncOPD 6.1, arXiv:2606.24143; status EXACT)."""

from typing import Annotated

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch, TokenLoss, declared


class McOpd(Sampled, frozen=True, tag="mc_opd"):
    """ℓ = -(1/m) Σ_i sg[ρ(a_i) · A(a_i)] · log π(a_i), a_1 the generated token, a_2 … a_m drawn
    beside it, i.i.d. with replacement from the behaviour policy and not rolled out. Variance at a
    prefix falls as 1/m; m = 1 is OPD.

    A task `reward` is a second part: what it makes of the signal of the generated token, within
    `signal_at_most` or not, is added undivided, as the mean over responses of `opd` has it.
    """

    m: Annotated[int, Meta(ge=1)] = 4

    def requirements(self) -> Needs:
        """Ask for m - 1 samples of the behaviour policy at each position, with the teacher's
        log-probs."""
        return Needs(teacher_at_student_ids=self.m - 1, student_ids="sampled")

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute ℓ [N], the mean of a position's m samples."""
        student_NM = _beside(declared(batch.student_logp_N), batch.student_logp_NK)
        behaviour_NM = _beside(batch.behaviour_logp_N, batch.behaviour_logp_NK)
        teacher_NM = _beside(batch.teacher_logp_N, batch.teacher_logp_NK)
        signal_NM = behaviour_NM if self.student_signal == "cached" else student_NM.detach()
        free_NM = self.anchored(
            advantages.reverse_kl(signal_NM, teacher_NM), student_NM, behaviour_NM
        )
        advantage_NM, bounded_N = self.bounded(free_NM)
        if self.reward:  # which the generated token alone has led to; its m undoes the mean's
            rewarded_N, over_N = self.bounded(free_NM[:, 0] + self.reward.part(batch))
            advantage_NM[:, 0] += self.m * (rewarded_N - advantage_NM[:, 0])
            bounded_N = over_N if bounded_N is None else declared(over_N) | bounded_N
        loss_NM, ratio_NM = self.correction.apply(batch, student_NM, behaviour_NM, advantage_NM)
        return TokenLoss(
            loss_N=loss_NM.mean(1),
            weight_N=behaviour_NM.new_ones(len(behaviour_NM)),
            advantage=advantage_NM,
            ratio=ratio_NM,
            bounded_N=bounded_N,
            added_N=ratio_NM[:, 0] if self.reward else None,
        )


def _beside(sampled_N: Tensor, more_NK: Tensor | None) -> Tensor:
    import torch

    return sampled_N[:, None] if more_NK is None else torch.cat([sampled_N[:, None], more_NK], 1)
