"""The seam of an objective: what it is given, what it declares, what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from async_opd.core.wire import Needs
from async_opd.objectives.modifiers import DriftGate, Position, RandomShare

if TYPE_CHECKING:
    from torch import Tensor

    from async_opd.maths.advantages import Moments


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """All response tokens of a packed micro-batch, prompts and padding already left out, the tokens
    of a trajectory together and in order. Log-probs in nats, of logits divided by the sampling
    temperature. Only `student_*` log-probs and entropies carry gradient. A field that no need
    declares is None, and in a first pass that does not read the student its fields are too."""

    student_logp_N: Tensor | None  # live student
    behaviour_logp_N: Tensor  # the weights that sampled each token
    teacher_logp_N: Tensor
    segment_N: Tensor  # int64, index of the token's trajectory in the micro-batch
    key_S: Tensor  # int64, names the trajectory, whatever batch it is in
    reward_S: Tensor  # 1 right, 0 wrong, NaN unknown
    group_reward_SG: Tensor  # rewards of all samples of the same prompt
    cap_S: Tensor  # most tokens a response may have
    step: int = 1  # the optimizer step that is being made, from 1
    reference_logp_N: Tensor | None = None
    student_logp_NK: Tensor | None = None  # at the candidates
    behaviour_logp_NK: Tensor | None = None  # at the same candidates, where they are samples
    teacher_logp_NK: Tensor | None = None
    student_tail_logp_N: Tensor | None = None  # log-mass of all ids but the candidates
    teacher_tail_logp_N: Tensor | None = None
    student_entropy_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None
    hidden_ND: Tensor | None = None  # what the student's head reads, detached
    # 0-d float64, by names in `needs`, and `tokens`
    statistics: dict[str, Tensor] = field(default_factory=dict)
    # of all past steps, by the names `needs` declares
    running: dict[str, Moments] = field(default_factory=dict)

    @property
    def trajectories(self) -> int:
        """S."""
        return len(self.reward_S)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a method says of each token, before weights that compose with it; [N, M] where a
    position has M samples."""

    loss_N: Tensor  # unreduced, by the method's own weight
    weight_N: Tensor  # the method's own, detached; 1 where it has none
    advantage: Tensor | None = None  # detached; None for a divergence, which has none
    ratio: Tensor | None = None  # detached factor for staleness; None: none is applied
    # [N] by name: their means over kept tokens are metrics
    shown: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Terms):
    """`Terms` with the composed weights multiplied in; exactly 0 outside `selected_N`. The one
    reduction is the learner's."""

    selected_N: Tensor  # bool


class Objective(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="tag"
):
    """Settings of one objective and its maths. A subclass sets `tag` and implements `wants` and
    `terms`; `selection`, `measures` and `episode` where it has such. What follows composes with
    every objective."""

    drift_gate: DriftGate | None = None
    position: Position | None = None
    random: RandomShare | None = None
    constant: Annotated[float, Meta(gt=0)] = 1.0  # a control: weight of every token
    # kept tokens; the selected of them; first over
    mean_over: Literal["tokens", "selected", "sequences"] = "tokens"
    # each trajectory's, then over trajectories

    # whether there is a signal where student and teacher agree
    learns_from_agreement: ClassVar[bool] = False
    shown: ClassVar[tuple[str, ...]] = ()  # names in `Terms.shown`

    def __post_init__(self):
        selects = self.position or self.random or type(self).selection is not Objective.selection
        if self.mean_over == "selected" and not selects:
            raise ValueError("mean_over = 'selected': has no effect without position or random")

    @property
    def tag(self) -> str:
        """Its name in a config."""
        return self.__struct_config__.tag

    def wants(self) -> Needs:
        """What this method must be supplied with."""
        return Needs()

    def terms(self, batch: TokenBatch) -> Terms:
        """Loss of each response token, to be minimised. Sees all tokens; exclusion comes in the
        reduction."""
        raise NotImplementedError

    def selection(self, batch: TokenBatch) -> Tensor | None:
        """Which tokens the method trains on, bool [N]; None: all."""
        return None

    def measures(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What each sum or maximum that the method declares is taken of, [N] by name, in a new
        dict."""
        return {}

    def episode(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What the running moments that the method declares are taken of, [S] by name; NaN is left
        out."""
        return {}

    def needs(self) -> Needs:
        """What the generator, the teachers and the learner must compute and ship: the method's, and
        what composes."""
        own = self.wants()
        gate = ("drift_gate",) if self.drift_gate else ()
        chosen = ("selected",) if self.mean_over == "selected" else ()
        # by what the student says
        selects = chosen and type(self).selection is not Objective.selection
        live = bool(own.first_pass or gate or selects)
        return msgspec.structs.replace(own, sums=(*own.sums, *gate, *chosen), first_pass=live)

    def statistics(self, batch: TokenBatch, kept_N: Tensor) -> dict[str, Tensor]:
        """The declared sums and maxima over the kept tokens of one batch, at least one, and their
        number, `tokens`; 0-d float64. The learner reduces them over micro-batches and ranks, before
        any `loss` is asked for."""
        value_N = self.measures(batch)
        if self.drift_gate:
            value_N["drift_gate"] = self.drift_gate.gate(batch)
        if self.mean_over == "selected":
            value_N["selected"] = self._selected(batch)
        needs = self.needs()
        sums = {name: value_N[name][kept_N].double().sum() for name in needs.sums}
        maxima = {name: value_N[name][kept_N].double().max() for name in needs.maxima}
        return {"tokens": kept_N.double().sum()} | sums | maxima

    def loss(self, batch: TokenBatch) -> TokenLoss:
        """The method's terms times the weights that compose with it, on what it and they select."""
        terms, selected_N = self.terms(batch), self._selected(batch)
        factor_N = batch.behaviour_logp_N.new_full(selected_N.shape, self.constant)
        if self.drift_gate:
            factor_N = factor_N * self.drift_gate.weight(batch)
        return TokenLoss(
            loss_N=(terms.loss_N * factor_N).where(selected_N, 0),
            weight_N=terms.weight_N * factor_N,
            advantage=terms.advantage,
            ratio=terms.ratio,
            shown=terms.shown,
            selected_N=selected_N,
        )

    def _selected(self, batch: TokenBatch) -> Tensor:
        parts = [self.selection(batch)]
        parts += [chooser.chosen(batch) for chooser in (self.position, self.random) if chooser]
        selected_N = batch.behaviour_logp_N.new_ones(len(batch.segment_N), dtype=bool)
        for part_N in parts:
            selected_N = selected_N if part_N is None else selected_N & part_N
        return selected_N
