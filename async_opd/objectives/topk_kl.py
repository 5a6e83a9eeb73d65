"""Divergence from the teacher over K candidates a position (GKD, arXiv:2306.13649; AsyncOPD 6.1,
arXiv:2606.24143)."""

from typing import Annotated, Literal

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import divergences
from async_opd.objectives.base import Objective
from async_opd.objectives.modifiers import PrefixRatio, refuse_change
from async_opd.objectives.token_batch import TokenBatch, TokenLoss, declared


class TopkKl(Objective, frozen=True, tag="topk_kl"):
    """ℓ = D(π_T, π) over the K likeliest tokens of the teacher, or of the behaviour policy, at each
    position.

    By default the rest of the vocabulary is one more outcome (RECONSTRUCTION), of the log-mass of
    its ids, which makes it a divergence; K = V makes it the exact one (GKD, EXACT). AsyncOPD's
    paper renormalises over the K; its code drops the rest, so that agreement is no minimum. Dense
    over the vocabulary, so the token's own ratio ρ would only add variance: that of the prefix, or
    none. `signal_at_most` clips the log-ratios of the reverse KL; the others are bounded by
    themselves.
    """

    k: Annotated[int, Meta(ge=1)]  # candidates a position
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    # teacher's share of the mixture, jensen_shannon only
    beta: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    support: Literal["teacher", "student"] = "teacher"  # whose likeliest tokens
    rest: Literal["bucket", "renormalise", "drop"] = "bucket"  # what becomes of the tokens outside
    prefix: PrefixRatio | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "jensen_shannon":
            refuse_change(self, "beta", f"divergence = {self.divergence!r}")
        if self.k == 1 and self.rest == "renormalise":
            raise ValueError(
                "k = 1: must be > 1 with rest = 'renormalise', or the one candidate is certain to"
                " both"
            )

    def requirements(self) -> Needs:
        """Ask for the teacher's K likeliest tokens, or its log-probs at the behaviour policy's; and
        the tail of a bucket."""
        tail = self.rest == "bucket"
        if self.support == "teacher":
            return Needs(teacher_topk=self.k, tail=tail)
        return Needs(teacher_at_student_ids=self.k, tail=tail)

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute the loss [N], nats; ≥ 0 and zero where student = teacher, unless the rest is
        dropped."""
        student = divergences.outcomes(
            declared(batch.student_logp_NK), batch.student_tail_logp_N, rest=self.rest
        )
        teacher = divergences.outcomes(
            declared(batch.teacher_logp_NK), batch.teacher_tail_logp_N, rest=self.rest
        )
        bounded_N = None
        if self.divergence == "forward":
            loss_N = divergences.kl(teacher, student)
        elif self.divergence == "reverse" and self.signal_at_most:
            loss_N, bounded_N = divergences.bounded_reverse_kl(
                student, teacher, at_most=self.signal_at_most, whole=self.rest != "drop"
            )
        elif self.divergence == "reverse":
            loss_N = divergences.kl(student, teacher)
        else:
            loss_N = divergences.jensen_shannon(student, teacher, beta=self.beta)
        ratio_N = self.prefix.factor(batch) if self.prefix else None
        return TokenLoss(
            loss_N=loss_N if ratio_N is None else ratio_N * loss_N,
            weight_N=batch.behaviour_logp_N.new_ones(len(loss_N)),
            ratio=ratio_N,
            bounded_N=bounded_N,
        )
