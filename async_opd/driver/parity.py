"""Whether a generator holds the learner's weights, judged by what both say of the same tokens."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from async_opd.core.errors import ParityError
from async_opd.core.events import EventSink
from async_opd.core.wire import Floats, Ints, Prompt

TOKENS = 256  # of one probe, at least, behind prompts of the run's own data
# Of one request, at most: in float32, as on CPUs, where the learner waits for each, and in half
# precision, where it reads prompts that may be long.
EACH, EACH_HALF = 8, 32
# Where a router flips now and then, a few tokens of several nats make up the mean over TOKENS: what
# it is at version 0, and what is doubted, is measured over so many times as many tokens.
FIRST = 4
AGAIN = 8
TAIL = 5.0  # times the bound of the mean, above which the 99th percentile is told


class HalfPrecision(NamedTuple):
    """What generators and learner may differ by where one of them computes in half precision, in
    nats: rounding shows on every token, and a router of experts that flips, on a few, by much."""

    mean: float  # of the gap over a probe's tokens, at version 0
    drift: float  # that it may be larger later


class Gap(NamedTuple):
    """How far two are apart over the same tokens: of |log p - log q|, in nats."""

    tokens: int
    mean: float
    p90: float
    p99: float
    largest: float

    @classmethod
    def of(cls, logp: Floats, other: Floats) -> "Gap":
        """Measure it. What is no number is no agreement: then none of these is a number."""
        apart = np.abs(logp.astype(np.float64) - other)
        p90, p99 = np.quantile(apart, (0.9, 0.99)).tolist()
        return cls(len(apart), float(apart.mean()), p90, p99, float(apart.max()))

    def __str__(self) -> str:
        return (
            f"{self.mean:.2e} nats in the mean over {self.tokens} tokens (90th"
            f" percentile {self.p90:.1e}, 99th {self.p99:.1e}, largest {self.largest:.1e})"
        )


def requests(tokens_each: int) -> int:
    """Count the requests of a probe, where each samples so many tokens."""
    return math.ceil(TOKENS / tokens_each)


def prompts_of(prompts: Sequence[Prompt], count: int, drawn: int) -> list[Ints]:
    """Choose `count` of `prompts` in turn, behind the `drawn` ones: two probes that follow each
    other have none in common, where there are enough."""
    return [prompts[(drawn + i) % len(prompts)].ids for i in range(count)] if prompts else []


class Parity:
    """The bounds of one run, and what was measured at version 0."""

    def __init__(self, tolerance: float, half: HalfPrecision | None, emit: EventSink):
        """In float32 every token is within `tolerance` nats. In `half` precision it is the mean
        that is bounded. `emit` hears of what is no error."""
        self._tolerance = tolerance
        self._half = half
        self._emit = emit
        self.first: float | None = None  # the mean over all generators at version 0
        self._tail = 0.0  # the largest 99th percentile that was told

    @property
    def asks_twice(self) -> bool:
        """Whether a gap above the bound is looked at once more, over other tokens."""
        return self._half is not None

    @property
    def times(self) -> int:
        """How many times TOKENS the next probe is to have."""
        return FIRST if self._half and self.first is None else 1

    def tokens_each(self, max_new_tokens: int) -> int:
        """Count the tokens of a request, where a response has at most `max_new_tokens`."""
        return min(EACH_HALF if self._half else EACH, max_new_tokens)

    def allows(self, gap: Gap) -> bool:
        """Tell whether a generator may be that far from the learner."""
        if self._half is None:
            return gap.largest <= self._tolerance
        return gap.mean <= self._bound(self._half)

    def measured(self, version: int, gap: Gap) -> None:
        """Note what all generators together are apart from the learner, and are allowed to. A long
        tail is told, and again where it has doubled."""
        if self._half is None:
            return
        limit = TAIL * self._bound(self._half)
        if gap.p99 > max(limit, 2 * self._tail):
            self._tail = gap.p99
            self._emit(
                "parity",
                "generators",
                f"version {version}: {gap}; a 99th percentile above {limit:.2g} is much for"
                " rounding, though the mean is within its bound",
            )
        if self.first is None and math.isfinite(gap.mean):
            self.first = gap.mean

    def passed_again(self, who: str, version: int, gap: Gap, again: Gap) -> None:
        """Tell that a second probe has taken back what the first one said."""
        self._emit("parity", who, f"version {version}: {gap}, but over other tokens {again}")

    def error(self, who: str, version: int, gap: Gap, again: Gap | None = None) -> ParityError:
        """Put into words that `who` is further from the learner than allowed; `again` is the second
        probe's gap."""
        if self._half is None or again is None:
            return ParityError(
                f"{who}: log-probs differ by {gap.largest:.2e} nats from the learner's at version"
                f" {version}; sync.parity_tolerance = {self._tolerance:g}"
            )
        bound = self._bound(self._half)
        allowed = (
            f"sync.parity_mean = {bound:g}"
            if self.first is None
            else f"{bound:.3g}, the {self.first:.2e} at version 0 + sync.parity_drift ="
            f" {self._half.drift:g}"
        )
        cause = (
            "few tokens make it up: a router that flips, or a part of its weights that is not the"
            " learner's"
            if again.p90 < bound
            else "most tokens differ: its weights are not the learner's, or it computes otherwise"
        )
        return ParityError(
            f"{who}: log-probs differ from the learner's at version {version} by {gap}, and over"
            f" other tokens by {again}; allowed is a mean of {allowed}: {cause}"
        )

    def _bound(self, half: HalfPrecision) -> float:
        return half.mean if self.first is None else self.first + half.drift


def row(gap: Gap | None) -> dict[str, float | None]:
    """Name what a row of metrics says of a probe, where there was one."""
    return {
        "parity_gap": gap and gap.largest,
        "parity_mean": gap and gap.mean,
        "parity_p99": gap and gap.p99,
    }
