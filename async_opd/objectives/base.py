"""The seam of an objective: what it is given, what it declares, what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from async_opd.wire import Needs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """All response tokens of a packed micro-batch, prompts and padding already left out. Log-probs in nats, of logits
    divided by the sampling temperature. Only `student_*` carry gradient. A field no need declares is None."""

    student_logp_N: Tensor  # live student
    behaviour_logp_N: Tensor  # the weights that sampled each token
    teacher_logp_N: Tensor
    segment_N: Tensor  # int64, index of the token's trajectory in the micro-batch
    reward_S: Tensor  # 1 right, 0 wrong, NaN unknown
    student_logp_NK: Tensor | None = None  # at the candidates
    teacher_logp_NK: Tensor | None = None  # at the same candidates
    student_entropy_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)  # 0-d float32, by the names `needs` declares


@dataclass(frozen=True)
class TokenLoss:
    """Unreduced result: the one reduction happens in the learner."""

    loss_N: Tensor
    weight_N: Tensor  # the detached importance weight each token's signal was multiplied by; for metrics


class Objective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="tag"):
    """Settings of one objective and its maths. Subclasses set `tag` and say what they need."""

    def needs(self) -> Needs:
        """What the teacher and the learner must compute, score and ship for this objective."""
        return Needs()

    def statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What each declared sum or maximum is taken of, [N] by name; the learner reduces it over the kept tokens of
        every micro-batch and rank, without gradient, before any `loss` is asked for. A sum of ones counts them."""
        raise NotImplementedError

    def loss(self, batch: TokenBatch) -> TokenLoss:
        """Loss of each response token, [N], to be minimised. Sees all tokens; exclusion comes in the reduction."""
        raise NotImplementedError
