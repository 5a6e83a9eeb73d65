"""OPD weighted by accumulated discrepancy: early tokens count more (IW-OPD, arXiv:2606.22600)."""

from typing import Annotated, Literal

from msgspec import Meta, field

from async_opd.maths import Tensor, gates
from async_opd.objectives.g_opd import GOpd
from async_opd.objectives.modifiers import refuse_change
from async_opd.objectives.token_batch import TokenBatch


class IwOpd(GOpd, frozen=True, tag="iw_opd"):
    """W_t = 1 + γ(1 - Σ_{k < t}|A_k| / Σ_k|A_k|), A = log π_T - log π (Eq. 14-17, 68; EXACT); W in
    [1, 1 + γ].

    Not mean-one: its mean, about 1 + γ/2, raises the step; `opd` with `constant` is the control.
    With λ ≠ 1 it weighs A(λ) of `g_opd` (IW-ExOPD; RECONSTRUCTION: r_t · A(λ), the paper has no
    formula). With `signal_at_most` the sums are of what it leaves of |A_k|.
    """

    gamma: Annotated[float, Meta(ge=0)] = 0.5
    lam: Annotated[float, Meta(gt=0)] = field(default=1.0, name="lambda")
    # tokens in the sum below: the code's, or the paper's
    total: Literal["all", "before_last"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma:
            refuse_change(self, "total", "gamma = 0")

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute W [N]."""
        return gates.prefix_discrepancy(
            self.bounded_gap(batch),
            batch.segment_N,
            batch.trajectories,
            gamma=self.gamma,
            through_last=self.total == "all",
        )
