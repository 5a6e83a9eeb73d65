"""Generalised OPD: the teacher's step away from a reference, extrapolated (G-OPD / ExOPD,
arXiv:2602.12125)."""

from typing import Annotated

from msgspec import Meta, field

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch


class GOpd(Sampled, frozen=True, tag="g_opd"):
    """A(λ) = (log π_T - log π) + (λ-1)(log π_T - log π_ref); Eq. 14 as REPAIRED: printed is the
    cost, its negative.

    λ = 1 is OPD, below it interpolates, above it extrapolates (ExOPD, 1.25 there; 1.5 already
    unstable).
    """

    lam: Annotated[float, Meta(gt=0)] = field(default=1.25, name="lambda")

    def requirements(self) -> Needs:
        """Ask for log-probs of the reference, unless λ = 1."""
        return Needs(reference=self.lam != 1)

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute A(λ) [N]."""
        return advantages.extrapolated(
            self.signal_logp(batch), batch.teacher_logp_N, batch.reference_logp_N, lam=self.lam
        )
