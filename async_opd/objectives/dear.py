"""OPD on decision tokens and the evidence for them (DEAR, arXiv:2606.22830)."""

from typing import Literal

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, selection
from async_opd.objectives.modifiers import Share, refuse_change
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch, declared


class Dear(Sampled, frozen=True, tag="dear"):
    """OPD on D ∪ E: the share p of a response where the student's entropy is largest, and the share
    q of the rest that scores highest by cosine to a decision times 1 + divergence (Eq. 1-8,
    Algorithm 1; EXACT, Eq. 2 REPAIRED: its leading sg(A) would square the advantage).

    RECONSTRUCTION, as the paper leaves open: the mean is over the selected tokens (`mean_over =
    "tokens"` is 1/T), the range of min-max is the tokens that are no decisions, and hidden states
    are those after the final norm, at the position that predicts the token. D is counted, the first
    of equals first, where Eq. 3-4 keep all at the (1-p) quantile or above: the two differ by at
    most one token, and by ties. Entropy and hidden states are always the live student's. With
    `signal_at_most` the divergence is what it leaves of one, so that a single one does not make all
    others alike.
    """

    p: Share = 0.2
    q: Share = 0.2
    mean_over: Literal["tokens", "selected", "sequences"] = "selected"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p == 1:
            refuse_change(self, "q", "p = 1")

    def requirements(self) -> Needs:
        """Ask for the student's own entropy and hidden states."""
        return Needs(student_entropy=True, hidden_state=True)

    def selection(self, batch: TokenBatch) -> Tensor:
        """Choose D ∪ E, bool [N]."""
        return selection.decisions_and_evidence(
            declared(batch.student_entropy_N).detach(),
            self.bounded_gap(batch).abs(),
            declared(batch.hidden_ND),
            batch.segment_N,
            batch.trajectories,
            p=self.p,
            q=self.q,
        )
