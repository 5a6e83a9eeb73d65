"""OPD that weighs likely wrong responses (ReNIO, arXiv:2606.23104)."""

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, gates
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch


class Renio(Sampled, frozen=True, tag="renio"):
    """W = w/w̄ of each response, w = exp(mean over K of min(l, clip)), K its tokens with l = log
    π - log π_T above τ, w = 1 where it has none (Eq. 4-9; EXACT). The number of such tokens plays
    no part: one of l ≥ clip gives the largest weight, e^clip.

    RECONSTRUCTION: w̄ is over the responses of the step that hold a trained token, on all ranks
    (the code's is over a micro-batch); l has no lower clip; the live student's l, detached, and ρ̃
    beside it. Tokens that left the loss stay in K. The response's own loss is OPD's here, where the
    paper has a divergence over the vocabulary. With `mean_over = "tokens"` the weight is no longer
    of mean one. τ and clip are the best of the paper's ablation; its code has four other pairs.
    """

    metrics: ClassVar = {
        "no_key": ("share", "of the trained tokens whose response has no token above tau"),
        "weight_stale": (
            "factor",
            "the response's weight, mean over the trained tokens with a lag",
        ),
    }

    tau: Annotated[float, Meta(gt=0)] = 0.8  # nats
    clip: Annotated[float, Meta(gt=0, le=80)] = 3.0  # nats
    mean_over: Literal["tokens", "selected", "sequences"] = "sequences"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip <= self.tau:
            raise ValueError(f"clip = {self.clip}: must be > tau = {self.tau}")

    def requirements(self) -> Needs:
        """Ask for the mean of w over the step's responses under the live student."""
        return Needs(response_sums=("renio",), first_pass=self.student_signal == "live")

    def trajectory_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute w [S] before its mean is divided out."""
        return {
            "renio": gates.likely_wrong(
                -self.bounded_gap(batch),
                batch.segment_N,
                batch.trajectories,
                tau=self.tau,
                clip=self.clip,
            )
        }

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute w/w̄ [N]."""
        mean = batch.statistics["renio"] / batch.statistics["sequences"].clamp(min=1)
        weight_S = self.trajectory_statistics(batch)["renio"] / mean.clamp(min=1e-6)
        return weight_S.to(batch.behaviour_logp_N.dtype)[batch.segment_N]

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark responses without a key token, and show the weight of stale tokens."""
        plain_S = self.trajectory_statistics(batch)["renio"] == 1
        return {
            "no_key": plain_S[batch.segment_N],
            "weight_stale": self.weight(batch).where(batch.lag_N > 0, float("nan")),
        }
