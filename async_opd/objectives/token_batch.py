"""What an objective is given of a micro-batch, and what it returns."""

from dataclasses import dataclass, field

from async_opd.maths import Tensor
from async_opd.maths.advantages import Moments


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """All response tokens of a packed micro-batch, prompts and padding already left out, the tokens
    of a trajectory together and in order. Log-probs in nats, of logits divided by the sampling
    temperature. Only `student_*` log-probs and entropies carry gradient. A field that no
    requirement declares is None, and in a first pass that does not read the student its fields are
    too: `declared` reads one that is."""

    student_logp_N: Tensor | None  # live student
    behaviour_logp_N: Tensor  # the weights that sampled each token
    teacher_logp_N: Tensor
    targets_N: Tensor  # int64, the sampled tokens
    segment_N: Tensor  # int64, index of the token's trajectory in the micro-batch
    key_S: Tensor  # int64, names the trajectory, whatever batch it is in
    reward_S: Tensor  # 1 right, 0 wrong, NaN unknown
    group_reward_SG: Tensor  # rewards of all samples of the same prompt
    group_length_SG: Tensor  # and their tokens
    cap_S: Tensor  # most tokens a response may have
    lag_N: Tensor  # optimizer steps that the weights which sampled the token are behind
    group_S: Tensor  # int64, number of the trajectory's group in the step
    groups: int = 1  # of the step
    step: int = 1  # the optimizer step that is being made, from 1
    candidate_ids_NK: Tensor | None = None  # int64
    reference_logp_N: Tensor | None = None
    student_logp_NK: Tensor | None = None  # at the candidates
    behaviour_logp_NK: Tensor | None = None  # at the same candidates, where they are samples
    teacher_logp_NK: Tensor | None = None
    student_tail_logp_N: Tensor | None = None  # log-mass of all ids but the candidates
    teacher_tail_logp_N: Tensor | None = None
    student_entropy_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
    hidden_ND: Tensor | None = None  # what the student's head reads, detached
    # float64, 0-d or one for each group, by the names that the requirements declare; `tokens` and
    # `sequences`
    statistics: dict[str, Tensor] = field(default_factory=lambda: {})
    # of all past steps, by the names that the requirements declare
    running: dict[str, Moments] = field(default_factory=dict[str, Moments])

    @property
    def trajectories(self) -> int:
        """S."""
        return len(self.reward_S)

    @property
    def group_N(self) -> Tensor:
        """Number in the step of each token's group, int64 [N]."""
        return self.group_S[self.segment_N]

    @property
    def outside_N(self) -> Tensor:
        """Mark the sampled tokens that are none of the candidates, bool [N]."""
        return (declared(self.candidate_ids_NK) != self.targets_N[:, None]).all(1)


def declared(value: Tensor | None) -> Tensor:
    """Return a field of the batch that the objective's requirements declare. Raises TypeError where
    they do not."""
    if value is None:
        raise TypeError("an objective reads a field of the batch that its requirements lack")
    return value


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """What a method says of each token, before weights that compose with it; [N, M] where a
    position has M samples."""

    loss_N: Tensor  # unreduced, by the method's own weight
    weight_N: Tensor  # the method's own, detached; 1 where it has none
    advantage: Tensor | None = None  # detached; None for a divergence, which has none
    ratio: Tensor | None = None  # detached factor for staleness; None: none is applied
    # bool [N], whose signal the method clipped; None: it clips none
    bounded_N: Tensor | None = None
    # detached factor of a second part of the loss, which W · ρ̃ does not multiply
    added_N: Tensor | None = None

    @property
    def largest_N(self) -> Tensor:
        """The largest factor that multiplies a signal of the token: W · ρ̃, or that of a second
        part."""
        largest_N = self.weight_N
        if self.ratio is not None:
            largest_N = largest_N * self.ratio.reshape(len(largest_N), -1).amax(1)
        return largest_N if self.added_N is None else largest_N.maximum(self.added_N)


@dataclass(frozen=True, kw_only=True)
class ComposedLoss(TokenLoss):
    """`TokenLoss` with the composed weights multiplied in; exactly 0 outside `selected_N`. The one
    reduction is the learner's."""

    selected_N: Tensor  # bool
    metrics: dict[str, Tensor]  # [N] by name: their means over kept tokens are metrics of the step
