"""The seam of an objective: what it declares, and what it makes of a batch."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from async_opd.core.errors import ConfigError
from async_opd.core.wire import Needs
from async_opd.maths import Tensor, segments
from async_opd.objectives import bounds
from async_opd.objectives.freshness import Freshness
from async_opd.objectives.modifiers import Bound, DriftGate, Position, RandomShare
from async_opd.objectives.reward import SHARES
from async_opd.objectives.token_batch import ComposedLoss, TokenBatch, TokenLoss, declared

RENAMED = {
    "wants": "requirements",
    "measures": "token_statistics",
    "terms": "token_loss",
    "show": "token_metrics",
    "shown": "metrics",
    "episode": "trajectory_statistics",
}

COMPOSED = {  # a setting of `objective`; the metrics it makes, each with unit and meaning
    "signal_at_most": {
        "signal_bounded": (
            "share",
            "of the trained tokens whose signal objective.signal_at_most lowered",
        ),
    },
    "weight_at_most": {
        "weight_bounded": (
            "share",
            "of the trained tokens whose W * ratio objective.weight_at_most lowered",
        ),
    },
    "freshness": {
        "freshness": ("factor", "weight by the age of the response, mean over the trained tokens"),
        "moved": (
            "nats/token",
            "KL that the student has moved on the response since it was sampled, mean over the"
            " trained tokens",
        ),
    },
    "reward": SHARES,
    "correction.narrowing": {
        f"prefix_kept_{quarter}": (
            "share",
            f"of the trained tokens in quarter {quarter} of their response, that"
            " objective.correction.narrowing lets pass",
        )
        for quarter in (1, 2, 3, 4)
    },
}
# what corrects how likely the student is to come to a prefix: one of these lines at a time
STATE_CORRECTIONS = (("freshness",), ("drift_gate",), ("prefix", "correction.of_prefix"))


class Objective(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="tag"
):
    """Settings of one objective and its maths. A subclass sets `tag` and implements `requirements`
    and `token_loss`; `selection`, `token_statistics`, `trajectory_statistics`, and `metrics` with
    `token_metrics`, where it has such. The settings below compose with every objective."""

    drift_gate: DriftGate | None = None
    freshness: Freshness | None = None
    position: Position | None = None
    random: RandomShare | None = None
    constant: Annotated[float, Meta(gt=0)] = 1.0  # a control: weight of every token
    # most that a token says, nats: |A|, of a divergence the log-ratio; before weights and ratio
    signal_at_most: Bound | None = None
    # most that this is multiplied by: the product of W, ρ̃, the drift gate or freshness and
    # `constant`
    weight_at_most: Bound | None = None
    # kept tokens; the selected of them; first over each trajectory's, then over trajectories
    mean_over: Literal["tokens", "selected", "sequences"] = "tokens"

    # whether `token_loss` takes the anchor of `freshness` off its advantage itself
    anchors: ClassVar[bool] = False
    # unit and meaning, in ASCII, of each metric of its own, by name
    metrics: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def __init_subclass__(cls) -> None:
        kinds = cls.__annotations__.items()
        settings = {name for name, kind in kinds if "ClassVar" not in f"{kind}"}
        for old in sorted((RENAMED.keys() & vars(cls).keys()) - settings):
            raise ConfigError(f"objective {cls.__name__}: {old} is called {RENAMED[old]} now")

    def __post_init__(self) -> None:
        selects = self.position or self.random or type(self).selection is not Objective.selection
        if self.mean_over == "selected" and not selects:
            raise ValueError("mean_over = 'selected': has no effect without position or random")
        corrections = [
            next(name for name in names if self.setting(name)).replace("of_prefix", "ratio")
            for names in STATE_CORRECTIONS
            if any(self.setting(name) for name in names)
        ]
        if len(corrections) > 1:
            raise ValueError(
                f"{corrections[0]}: must not stand beside {corrections[1]}, for both correct how"
                " far the student has moved from what it wrote"
            )

    @property
    def tag(self) -> str:
        """Its name in a config."""
        return str(self.__struct_config__.tag)

    @property
    def metric_names(self) -> list[str]:
        """The names of what `loss` measures: its own, and those of what composes and is set."""
        composed = [name for key in COMPOSED if self.setting(key) for name in COMPOSED[key]]
        return [*self.metrics, *composed]

    def setting(self, key: str) -> Any:
        """Look up a setting by its key in `[objective]`; None for one that the method has not."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name, None)
        return value

    def requirements(self) -> Needs:
        """Say what this method must be supplied with."""
        return Needs()

    def token_loss(self, batch: TokenBatch) -> TokenLoss:
        """Compute the loss of each response token, to be minimised. It sees all tokens; exclusion
        comes in the reduction."""
        raise NotImplementedError

    def selection(self, batch: TokenBatch) -> Tensor | None:
        """Choose the tokens that the method trains on, bool [N]; None: all."""
        return None

    def token_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what each sum or maximum that the method declares is taken of, [N] by name, in a
        new dict."""
        return {}

    def trajectory_statistics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what the running moments that the method declares are taken of, where NaN is left
        out, and its sums over responses; [S] by name."""
        return {}

    def token_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what each of `metrics` is the mean of over the kept tokens, [N] by name; NaN is
        left out."""
        return {}

    def composed_metrics(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute the same of what composes and is set, but for the two bounds."""
        return self.freshness.metrics(batch) if self.freshness else {}

    def needs(self) -> Needs:
        """Say what the generator, the teachers and the learner must compute and ship: for the
        method, and for what composes."""
        method = self.requirements()
        gate = ("drift_gate",) if self.drift_gate else ()
        chosen = ("selected",) if self.mean_over == "selected" else ()
        by_student = chosen and type(self).selection is not Objective.selection
        return msgspec.structs.replace(
            method,
            sums=(*method.sums, *gate, *chosen),
            first_pass=bool(method.first_pass or gate or by_student),
        )

    def statistics(self, batch: TokenBatch, kept_N: Tensor) -> dict[str, Tensor]:
        """Take the declared sums and maxima over the kept tokens of one batch, their number,
        `tokens`, and that of the responses that hold one, `sequences`; float64, 0-d or one for each
        group. The learner reduces them over micro-batches and ranks, before any `loss` is asked
        for."""
        value_N = self.token_statistics(batch)
        if self.drift_gate:
            value_N["drift_gate"] = self.drift_gate.gate(batch)
        if self.mean_over == "selected":
            value_N["selected"] = self._selected(batch)
        needs = self.needs()
        sums = {name: value_N[name][kept_N].double().sum() for name in needs.sums}
        maxima = {name: bounds.largest(value_N[name][kept_N].double()) for name in needs.maxima}
        kept_S = segments.sums(kept_N.double(), batch.segment_N, batch.trajectories) > 0
        counts = {"tokens": kept_N.double().sum(), "sequences": kept_S.double().sum()}
        value_S = self.trajectory_statistics(batch) if needs.response_sums else {}
        responses = {name: value_S[name][kept_S].double().sum() for name in needs.response_sums}
        groups = {
            name: segments.sums(value_N[name].double(), batch.group_N, batch.groups)
            for name in needs.group_sums
        }
        return counts | sums | maxima | responses | groups

    def moments(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Compute what running moments are taken of: for the method, and for what composes."""
        return self.trajectory_statistics(batch)

    def loss(self, batch: TokenBatch) -> ComposedLoss:
        """Multiply the method's loss by the weights that compose with it, on what it and they
        select; its signal and their product bounded where the settings say so."""
        method, selected_N = self._bounded_loss(batch), self._selected(batch)
        factor_N = batch.behaviour_logp_N.new_full(selected_N.shape, self.constant)
        if self.drift_gate:
            factor_N = factor_N * self.drift_gate.weight(batch)
        if self.freshness:
            factor_N = factor_N * self.freshness.weight(batch)
        bounded: dict[str, Tensor] = {}
        if self.signal_at_most:
            bounded["signal_bounded"] = declared(method.bounded_N) & selected_N
        if self.weight_at_most:
            product_N = factor_N * method.largest_N
            bounded["weight_bounded"] = (product_N > self.weight_at_most) & selected_N
            factor_N = factor_N * bounds.scale(product_N, self.weight_at_most)
        return ComposedLoss(
            loss_N=(method.loss_N * factor_N).where(selected_N, 0),
            weight_N=method.weight_N * factor_N,
            advantage=method.advantage,
            ratio=method.ratio,
            metrics=self.token_metrics(batch) | self.composed_metrics(batch) | bounded,
            selected_N=selected_N,
        )

    def bounded(self, signal: Tensor) -> tuple[Tensor, Tensor | None]:
        """Lower a signal to ±`signal_at_most`, and mark the tokens where that acted, bool [N];
        the signal as it is and None where it is not set. [N] or [N, M]."""
        most = self.signal_at_most
        if most is None:
            return signal, None
        over = signal.abs() > most
        return signal.clamp(-most, most), over.reshape(len(over), -1).any(1)

    def _bounded_loss(self, batch: TokenBatch) -> TokenLoss:
        if self.signal_at_most is None:
            return self._anchored_loss(batch)
        return bounds.signal(self._anchored_loss, batch, self.signal_at_most)

    def _anchored_loss(self, batch: TokenBatch) -> TokenLoss:
        method = self.token_loss(batch)
        if self.freshness and self.freshness.lam and not self.anchors:
            return self.freshness.anchored(method, batch)
        return method

    def _selected(self, batch: TokenBatch) -> Tensor:
        choosers = [chooser for chooser in (self.position, self.random) if chooser]
        selected_N = batch.behaviour_logp_N.new_ones(len(batch.segment_N)).bool()
        for part_N in (self.selection(batch), *(chooser.chosen(batch) for chooser in choosers)):
            selected_N = selected_N if part_N is None else selected_N & part_N
        return selected_N
