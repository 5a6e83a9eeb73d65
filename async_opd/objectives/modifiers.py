"""Weights and masks that compose with every objective. Each is a section of `[objective]`."""

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import fields

from async_opd.maths import Tensor, gates, importance, segments, selection
from async_opd.objectives.token_batch import TokenBatch, declared

Bound = Annotated[float, Meta(gt=0)]
Range = tuple[Bound, Bound]
Share = Annotated[float, Meta(gt=0, le=1)]


class DriftGate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight g/ḡ, g = exp(-τ|mean of log π - log π_behaviour over a block|), mean one over the kept
    tokens (blockwise policy-drift gate, arXiv:2606.24084; EXACT). Its π_old is the behaviour policy
    here, so it weighs staleness."""

    block: Annotated[int, Meta(ge=1)] = 64  # tokens
    tau: Annotated[float, Meta(gt=0)] = 1.0  # per nat

    def gate(self, batch: TokenBatch) -> Tensor:
        """Compute g [N]."""
        return gates.drift(
            declared(batch.student_logp_N).detach(),
            batch.behaviour_logp_N,
            batch.segment_N,
            block=self.block,
            tau=self.tau,
        )

    def weight(self, batch: TokenBatch) -> Tensor:
        """Compute g/ḡ [N], ḡ over the kept tokens of the whole step."""
        mean = batch.statistics["drift_gate"] / batch.statistics["tokens"].clamp(min=1)
        return self.gate(batch) / (mean + 1e-6)


class Position(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Trains on the first or the last ⌈share · length⌉ tokens of each response: an ablation (IW-OPD
    fig. 1a; EXACT (code) for the prefix, the code has no suffix).

    `mean_over = "selected"` takes the mean over that share, as `dear` does; otherwise the loss
    shrinks with it.
    """

    share: Share
    part: Literal["prefix", "suffix"] = "prefix"

    def __post_init__(self) -> None:
        if self.share == 1:
            refuse_change(self, "part", "share = 1")

    def chosen(self, batch: TokenBatch) -> Tensor:
        """Choose tokens, bool [N]; at least one token of each trajectory."""
        return selection.part(
            batch.segment_N,
            segments.lengths(batch.segment_N, batch.trajectories),
            share=self.share,
            end=self.part == "suffix",
        )


class RandomShare(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Trains on tokens chosen by chance, the same whatever batch they are in: a control at a
    method's keep rate, with its `mean_over`."""

    share: Share

    def chosen(self, batch: TokenBatch) -> Tensor:
        """Choose tokens, bool [N]: `share` of each response, at least one token of it."""
        return selection.at_random(batch.segment_N, batch.key_S, share=self.share)


class PrefixRatio(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weighs a dense term at t by how likely the live student is to come to t at all: Π_{k < t}
    ρ_k, then truncated."""

    at_most: Bound | None = None  # min(ρ, c)
    between: Range | None = None  # ρ · 1[a ≤ ρ ≤ b]

    def __post_init__(self) -> None:
        check_bounds(self.at_most, self.between)

    def factor(self, batch: TokenBatch) -> Tensor:
        """Compute the factor, detached, [N]."""
        return importance.truncate(
            importance.prefix_ratio(
                declared(batch.student_logp_N).detach(), batch.behaviour_logp_N, batch.segment_N
            ),
            at_most=self.at_most,
            between=self.between,
        )


def check_bounds(at_most: Bound | None, between: Range | None) -> None:
    """Raise ValueError for a range that holds nothing, and for a bound that lowers no ratio inside
    it."""
    if between and between[0] > between[1]:
        raise ValueError(f"between = {list(between)}: must be [least, most]")
    if between and at_most and at_most >= between[1]:
        raise ValueError(f"at_most = {at_most}: has no effect with between = {list(between)}")


def refuse_change(settings: Struct, name: str, others: str) -> None:
    """Raise ValueError where setting `name`, which has no effect with these `others`, is not left
    at its default."""
    (field,) = (f for f in fields(settings) if f.name == name)
    value = getattr(settings, name)
    if value != field.default:
        raise ValueError(f"{field.encode_name} = {value!r}: has no effect with {others}")
