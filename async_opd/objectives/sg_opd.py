"""Extrapolation gated by agreement with the verifier's sign (SG-OPD, arXiv:2606.09304).

Its phased teacher sampling is the section `[teacher_sampling]`, which any objective can take.
"""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, gates
from async_opd.objectives.modifiers import refuse_change
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch


class SgOpd(Sampled, frozen=True, tag="sg_opd"):
    """A = g · A(λ_high) + (1-g) · fallback, g = 1[a₁ · a₂ > 0], times φ = min(1, τ/|a₂|) of mean
    one (Eq. 4-10).

    a₁ is the reward among its group's known ones, 0 (so g = 0) where unknown or all alike; of one
    between 0 and 1 its sign says whether it lies above its group's mean. a₂ = log π_T - log π
    (REPAIRED: printed with the sign of the cost). Fallback `interp` is β · a₂ (EXACT).
    RECONSTRUCTION, as the paper names but does not give them: `preserve` = A(λ_base), `grpo` = a₁,
    τ, and which tokens φ's mean is over. `signal_at_most` bounds A, extrapolation and all, and the
    |a₂| of φ.
    """

    metrics: ClassVar = {
        "agree": ("share", "of the trained tokens where teacher and reward agree"),
        "disagree": ("share", "where they disagree"),
        "no_sign": ("share", "where the group has no sign"),
    }

    lambda_high: Annotated[float, Meta(ge=1)] = 1.8
    lambda_base: Annotated[float, Meta(gt=0)] = 1.0  # of `preserve`
    fallback: Literal["interp", "preserve", "grpo"] = "interp"
    beta: Annotated[float, Meta(ge=0, le=1)] = 1.0  # of `interp`: 1 is plain OPD, 0 drops the token
    tau: Annotated[float, Meta(gt=0)] = 1.0  # nats
    mean_over: Literal["tokens", "selected", "sequences"] = "sequences"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback != "interp":
            refuse_change(self, "beta", f"fallback = {self.fallback!r}")
        if self.fallback != "preserve":
            refuse_change(self, "lambda_base", f"fallback = {self.fallback!r}")

    def requirements(self) -> Needs:
        """Ask for log-probs of the reference, unless no λ reads them, and for the mean of φ under
        the live student."""
        reference = self.lambda_high != 1 or self.lambda_base != 1
        return Needs(
            reference=reference,
            groups=True,
            sums=("phi",),
            first_pass=self.student_signal == "live",
        )

    def token_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute φ before its mean is divided out."""
        return {"phi": gates.magnitude(self.bounded_gap(batch), tau=self.tau)}

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute A [N], before φ."""
        trust_N, gap_N = self._trust(batch), self.teacher_minus_student(batch)
        if self.fallback == "interp":
            conflict_N = self.beta * gap_N
        elif self.fallback == "preserve":
            conflict_N = self._extrapolated(batch, self.lambda_base)
        else:
            conflict_N = trust_N
        return self._extrapolated(batch, self.lambda_high).where(
            gates.agreement(trust_N, gap_N), conflict_N
        )

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute φ/φ̄ [N], φ̄ over the kept tokens of the whole step."""
        mean = batch.statistics["phi"] / batch.statistics["tokens"].clamp(min=1)
        return gates.magnitude(self.bounded_gap(batch), tau=self.tau) / mean.clamp(min=1e-6)

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark the tokens where the teacher's sign is the verifier's, is not, or where one of
        them has none."""
        sign_N = (self._trust(batch) * self.teacher_minus_student(batch)).sign()
        return {"agree": sign_N > 0, "disagree": sign_N < 0, "no_sign": sign_N == 0}

    def _trust(self, batch: TokenBatch) -> Tensor:
        return advantages.within_group(batch.reward_S, batch.group_reward_SG)[batch.segment_N]

    def _extrapolated(self, batch: TokenBatch, lam: float) -> Tensor:
        return advantages.extrapolated(
            self.signal_logp(batch), batch.teacher_logp_N, batch.reference_logp_N, lam=lam
        )
