"""OPD towards a teacher mixed with the student, which bounds the signal below (TOP-D,
arXiv:2607.04751)."""

from typing import Annotated, ClassVar

from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages
from async_opd.objectives.sampled import Sampled
from async_opd.objectives.token_batch import TokenBatch

NEAR = 0.9  # of the floor, in nats: what counts as being there


class TopD(Sampled, frozen=True, tag="top_d"):
    """r = log(α e^A + 1 - α) ≥ log(1 - α), A = log π_T - log π (Eq. 5; EXACT). α = 1 is OPD. The
    bound alone by default.

    `future` adds to each r the mean of those of the later tokens of the response (Eq. 7; EXACT but
    for the last token, RECONSTRUCTION: it has none), `normalise` takes mean and deviation over all
    tokens of the prompt's responses, whatever has left the loss (Eq. 8; EXACT; RECONSTRUCTION:
    population σ with a floor of 1e-6). The paper has both, A from the policy that sampled and the
    PPO clip: `student_signal = "cached"`, `correction.tag = "ppo"`. RECONSTRUCTION: the live A with
    ρ, under which the zero stays π = π_T where tokens are stale; a token that carries later
    rewards would need their ratios too.
    """

    metrics: ClassVar = {
        "floored": (
            "share",
            "of the trained tokens that the mixed teacher holds near log(1 - alpha)",
        )
    }

    alpha: Annotated[float, Meta(gt=0, le=1)] = 0.2  # the teacher's share of the mixture
    future: bool = False
    normalise: bool = False

    def requirements(self) -> Needs:
        """Ask for the moments over each prompt's responses, where they are divided out."""
        if not self.normalise:
            return Needs()
        return Needs(
            groups=True,
            group_sums=("top_d_tokens", "top_d", "top_d_squares"),
            first_pass=self.student_signal == "live",
        )

    def token_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what the moments are of."""
        if not self.normalise:
            return {}
        value_N = self._reward(batch).double()
        return {
            "top_d_tokens": value_N.new_ones(len(value_N)),
            "top_d": value_N,
            "top_d_squares": value_N.square(),
        }

    def advantage(self, batch: TokenBatch) -> Tensor:
        """Compute r [N], with what the settings make of it."""
        if not self.normalise:
            return self._reward(batch)
        return advantages.standardised(
            self._reward(batch),
            batch.group_N,
            batch.statistics["top_d_tokens"],
            batch.statistics["top_d"],
            batch.statistics["top_d_squares"],
        )

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Mark where the bound holds the signal."""
        floor = advantages.proximal(batch.behaviour_logp_N.new_tensor(-1e4), alpha=self.alpha)
        return {"floored": self._bound(batch) <= NEAR * floor}

    def _bound(self, batch: TokenBatch) -> Tensor:
        return advantages.proximal(self.teacher_minus_student(batch), alpha=self.alpha)

    def _reward(self, batch: TokenBatch) -> Tensor:
        reward_N = self._bound(batch)
        if not self.future:
            return reward_N
        return advantages.with_future(reward_N, batch.segment_N, batch.trajectories)
