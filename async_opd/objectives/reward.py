"""A task reward beside distillation: what the verifier says of a response is part of the advantage
of each of its tokens. The section `[objective.reward]` of every objective of the sampled token."""

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from async_opd.core.wire import Needs
from async_opd.maths import Tensor, advantages, segments
from async_opd.objectives.token_batch import TokenBatch

SMALLEST = 1e-30  # of two sizes that add up to nothing
RUNNING = "task_reward"  # its moments over the trajectories of all past steps
SHARES = {  # metrics: name, unit and meaning
    "distillation_share": (
        "share",
        "that distillation has of |A| + |reward part|, mean over trained tokens; of a token that"
        " neither says anything of, 0",
    ),
    "reward_share": ("share", "that the task reward has of the same"),
}


class Reward(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adds weight · (r - b) to the advantage of every token of a response, r = reward - λ · |y| /
    L_max, |y| its tokens and L_max the most it may have.

    Where the verdict is unknown nothing is added, and no baseline counts it. The method's own
    weights, the correction and the bounds hold for the sum. RECONSTRUCTION: the usual policy
    gradient with an outcome reward and without a standard deviation (Dr. GRPO, arXiv:2503.20783);
    no paper of those here adds one.
    """

    weight: Annotated[float, Meta(gt=0)] = 1.0  # nats: what a right answer adds to log π_T - log π
    # b: mean of the prompt's known samples; of all past steps, 0 before the first; or 0
    baseline: Literal["group", "running", "none"] = "group"
    length_penalty: Annotated[float, Meta(ge=0)] = 0.0  # λ: what the longest response loses

    def needs(self, method: Needs) -> Needs:
        """Add what the baseline takes to what the `method` needs."""
        if self.baseline == "group":
            return replace(method, groups=True)
        return replace(method, running=(*method.running, RUNNING)) if self.past else method

    @property
    def past(self) -> bool:
        """Whether the baseline is that of past steps."""
        return self.baseline == "running"

    def rewards(self, batch: TokenBatch) -> Tensor:
        """Compute r [S]; NaN where the verdict is unknown."""
        length_S = segments.lengths(batch.segment_N, batch.trajectories)
        return self._penalised(batch.reward_S, length_S, batch)

    def part(self, batch: TokenBatch) -> Tensor:
        """Compute what is added to the advantage, [N]."""
        part_S = self.weight * (self.rewards(batch) - self._baseline(batch))
        return part_S.nan_to_num(0)[batch.segment_N]

    def shares(self, part_N: Tensor, advantage_N: Tensor) -> dict[str, Tensor]:
        """Compute what `part` and the method's own advantage have of the sum of their sizes, [N]
        by name."""
        size_N, method_N = part_N.abs(), advantage_N.abs()
        both_N = (size_N + method_N).clamp(min=SMALLEST)
        return {"distillation_share": method_N / both_N, "reward_share": size_N / both_N}

    def _baseline(self, batch: TokenBatch) -> Tensor | float:
        if self.baseline != "group":
            return batch.running[RUNNING].mean if self.past else 0.0
        return advantages.group_mean(
            self._penalised(batch.group_reward_SG, batch.group_length_SG, batch)
        )

    def _penalised(self, reward: Tensor, length: Tensor, batch: TokenBatch) -> Tensor:
        if not self.length_penalty:  # then nobody need say how long a response may be
            return reward
        return advantages.length_penalised(reward, length, batch.cap_S, penalty=self.length_penalty)
