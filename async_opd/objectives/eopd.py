"""OPD plus forward KL where the teacher is uncertain (EOPD, arXiv:2603.07079)."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, divergences
from async_opd.objectives import bounds
from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.sampled import Importance, Ppo, Sampled
from async_opd.objectives.token_batch import TokenBatch, TokenLoss, declared


class Eopd(Sampled, frozen=True, tag="eopd"):
    """ℓ = ℓ_OPD + α · 1[H_T ≥ τ] · Σ_{v in top-k(π_T)} π_T(v) (log π_T(v) - log π(v)) (Eq. 10;
    EXACT (code): π_T is renormalised over the k, π is not, and ℓ_OPD of all tokens is PPO's without
    dual clip). It adds, and switches nothing off. With the rest a "bucket" instead, the added term
    is a divergence, zero where they agree.

    The code takes ℓ_OPD's advantage from the policy that sampled, `student_signal = "cached"`; the
    live one, our default, does not go stale.
    """

    metrics: ClassVar = {"uncertain": ("share", "of the trained tokens with the forward KL")}

    correction: Importance | Ppo = Ppo()
    tau: Annotated[float, Meta(ge=0)] = 0.8  # nats
    k: Annotated[int, Meta(ge=1)] = 16
    alpha: Annotated[float, Meta(gt=0)] = 1.0
    rest: Literal["bucket", "renormalise", "drop"] = "renormalise"
    prefix: PrefixRatio | None = None  # of the added term

    def requirements(self) -> Needs:
        """Ask for the teacher's k likeliest tokens, the tail of a bucket, and its exact entropy
        where τ > 0."""
        return Needs(teacher_topk=self.k, teacher_entropy=self.tau > 0, tail=self.rest == "bucket")

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute ℓ_OPD and what is added to it."""
        sampled = super().token_loss(batch)
        plain = "drop" if self.rest == "renormalise" else self.rest
        student = divergences.outcomes(
            declared(batch.student_logp_NK), batch.student_tail_logp_N, rest=plain
        )
        teacher = divergences.outcomes(
            declared(batch.teacher_logp_NK), batch.teacher_tail_logp_N, rest=self.rest
        )
        added_N, bounded_N = self.alpha * self._uncertain(batch), sampled.bounded_N
        more_N = added_N * divergences.kl(teacher, student)
        if self.prefix:
            prefix_N = self.prefix.factor(batch)
            more_N, added_N = prefix_N * more_N, prefix_N * added_N
        if self.signal_at_most:  # of the KL, Σ_v π_T(v), which never is above 1
            size_N = teacher.exp().sum(-1)
            more_N = more_N * bounds.scale(size_N, self.signal_at_most)
            bounded_N = declared(bounded_N) | ((added_N > 0) & (size_N > self.signal_at_most))
        return replace(
            sampled, loss_N=sampled.loss_N + more_N, bounded_N=bounded_N, added_N=added_N
        )

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark where the forward KL is added."""
        return {"uncertain": self._uncertain(batch)}

    def _uncertain(self, batch: TokenBatch) -> Tensor:
        """Compute 1[H_T ≥ τ] as a number, [N]."""
        one_N = batch.behaviour_logp_N.new_ones(len(batch.behaviour_logp_N))
        return one_N.where(declared(batch.teacher_entropy_N) >= self.tau, 0) if self.tau else one_N
