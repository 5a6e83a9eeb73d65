"""Divergence from the teacher over K candidates a position (GKD, arXiv:2306.13649; AsyncOPD 6.1,
arXiv:2606.24143)."""

from typing import Annotated, Literal

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import divergences, importance
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

    With the rest "sampled" the generated token stands for it where it is none of the K: ℓ = Σ_K
    sg[π (log π - log π_T)] log π - 1[y ∉ K] sg[ρ A] log π(y), whose mean over y is the gradient of
    the reverse KL over the whole vocabulary, the K without variance (revisiting_opd's code d10aedb,
    there with the head differentiated, which is biased beside that tail; RECONSTRUCTION). ρ is the
    tail's alone. It asks for nothing more.
    """

    k: Annotated[int, Meta(ge=1)]  # candidates a position
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "reverse"
    # teacher's share of the mixture, jensen_shannon only
    beta: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    support: Literal["teacher", "student"] = "teacher"  # whose likeliest tokens
    # what becomes of the tokens outside
    rest: Literal["bucket", "renormalise", "drop", "sampled"] = "bucket"
    prefix: PrefixRatio | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "jensen_shannon":
            refuse_change(self, "beta", f"divergence = {self.divergence!r}")
        if self.rest == "sampled" and self.divergence != "reverse":
            raise ValueError(
                f"rest = 'sampled': must be of divergence = 'reverse', not {self.divergence!r}"
            )
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
        dropped or sampled."""
        if self.rest == "sampled":
            return self._head_and_tail(batch)
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

    def _head_and_tail(self, batch: TokenBatch) -> TokenLoss:
        """Compute the loss whose rest is the sampled token; its ratio is the tail's, where there is
        one, and the head is a second part."""
        student_N, outside_N = declared(batch.student_logp_N), batch.outside_N
        rho_N = importance.ratio(student_N.detach(), batch.behaviour_logp_N).where(outside_N, 1)
        loss_N, over_N = divergences.head_and_tail(
            (declared(batch.student_logp_NK), declared(batch.teacher_logp_NK)),
            (student_N, batch.teacher_logp_N),
            outside_N,
            rho_N,
            at_most=self.signal_at_most,
        )
        prefix_N = self.prefix.factor(batch) if self.prefix else rho_N.new_ones(len(rho_N))
        return TokenLoss(
            loss_N=prefix_N * loss_N,
            weight_N=rho_N.new_ones(len(rho_N)),
            ratio=prefix_N * rho_N,
            bounded_N=over_N if self.signal_at_most else None,
            added_N=prefix_N.where(outside_N, 0),
        )
