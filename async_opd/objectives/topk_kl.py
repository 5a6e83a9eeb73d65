"""Divergence from the teacher over its K likeliest tokens and one bucket for the rest (GKD, arXiv:2306.13649)."""

from typing import Annotated, Literal

from msgspec import Meta

from async_opd import maths
from async_opd.objectives.base import Objective, TokenBatch, TokenLoss
from async_opd.wire import Needs


class TopkKl(Objective, tag="topk_kl"):
    """ℓ = D(π_T, π) over K + 1 outcomes; the tail bucket makes it a divergence, and K = V makes it the exact one.

    Dense over the vocabulary, so the token's own ratio ρ would only add variance: none is applied.
    """

    k: Annotated[int, Meta(ge=1)]  # candidates a position, the teacher's likeliest
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    beta: Annotated[float, Meta(gt=0, lt=1)] = 0.5  # teacher's share of the mixture, jensen_shannon only

    def needs(self) -> Needs:
        return Needs(teacher_topk=self.k)

    def loss(self, batch: TokenBatch) -> TokenLoss:
        """Loss [N], nats, ≥ 0, zero where student = teacher."""
        student, teacher = batch.student_logp_NK, batch.teacher_logp_NK
        if self.divergence == "forward":
            loss_N = maths.divergences.forward_kl(student, teacher)
        elif self.divergence == "reverse":
            loss_N = maths.divergences.reverse_kl(student, teacher)
        else:
            loss_N = maths.divergences.jensen_shannon(student, teacher, beta=self.beta)
        return TokenLoss(loss_N, batch.behaviour_logp_N.new_ones(len(loss_N)))
