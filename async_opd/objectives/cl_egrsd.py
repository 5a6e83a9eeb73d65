"""EGRSD whose entropy gate looks ahead (CL-EGRSD, arXiv:2605.13255 Eq. 8)."""

from typing import Annotated

from msgspec import Meta

from async_opd.maths import Tensor, segments
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.modifiers import refuse_change
from async_opd.objectives.token_batch import TokenBatch, declared


class ClEgrsd(Egrsd, frozen=True, tag="cl_egrsd"):
    """ω reads min H_T over [t, t + W] inside the response, over the same largest entropy as EGRSD
    (EXACT by Eq. 8; the paper's Algorithm 1 takes the largest of the minima instead). W = 0 is
    EGRSD.

    The paper: γ = 0.3, W = 3 at 4B; γ = 1, W = 5 at 8B.
    """

    window: Annotated[int, Meta(ge=0)] = 3  # tokens ahead

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma:
            refuse_change(self, "window", "gamma = 0")

    def gated_entropy(self, batch: TokenBatch) -> Tensor:
        """Compute the least entropy from the token on, [N]."""
        return segments.lookahead_minimum(
            declared(batch.teacher_entropy_N), batch.segment_N, self.window
        )
