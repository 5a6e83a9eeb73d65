"""What every actor does when, as the driver sees it: the time it has spent in each state, and, of the last steps of a
run, its states and calls one by one in `spans.jsonl`, which `async-opd trace` shows."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import time
from typing import Any

from msgspec import Struct

STATES = ("busy", "starved", "blocked", "syncing", "down")
FILE, EARLIER = "spans.jsonl", "spans.earlier.jsonl"
CUT_OFF = ", cut off"  # behind the name of a call that ended without an answer
COUNTED = ("queue_ready", "queue_outstanding", "generators_tokens_per_s", "teachers_tokens_per_s",
           "trained_tokens_per_s", "lag_mean", "lag_max")  # of a row of metrics  # fmt: skip

Of = str | int | tuple[str, ...]  # what a call is of: a group, a version, the groups of a step


class Line(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happened from `since` to `until`, in seconds of the driver's clock; with `epoch`, Unix time."""

    step: int | None  # whose row of metrics came at `until`; None: training starts or ends there
    epoch: float
    since: float
    until: float
    lanes: dict[str, str]  # state of every actor at `since`
    states: list[tuple[str, str, float]]  # actor, the state it entered, when
    calls: list[tuple[str, str, Of, float, float]]  # actor, call, what of, start, end; in the line where they end
    counters: dict[str, float | None]  # COUNTED


class Spans:
    """Takes what happens and hands it to `sink` a line a step."""

    def __init__(self, sink: Callable[[Line], None], clock: Callable[[], float]):
        self._sink, self._since = sink, clock()
        self._epoch = time() - self._since
        self._lanes: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """Start a line."""
        self._at_start = self._lanes.copy()
        self._states: list[tuple[str, str, float]] = []
        self._calls: list[tuple[str, str, Of, float, float]] = []

    def entered(self, lane: str, state: str, at: float) -> None:
        """The actor is in another state from `at` on."""
        self._lanes[lane] = state
        self._states.append((lane, state, at))

    def called(self, lane: str, call: str, of: Of, start: float, end: float) -> None:
        """The actor has answered a call."""
        self._calls.append((lane, call, of, start, end))

    def flush(self, until: float, row: dict[str, Any]) -> None:
        """All that was before `until` is known; `row` came then, or is empty."""
        if not self._lanes:  # nobody is there yet
            self._since = until
            return
        line = Line(
            step=row.get("step"),
            epoch=self._epoch,
            since=self._since,
            until=until,
            lanes=self._at_start,
            states=self._states,
            calls=self._calls,
            counters={key: row[key] for key in COUNTED if key in row},
        )
        self._since = until
        self.begin()
        self._sink(line)


class ActorTime:
    """The seconds one actor has spent in each of STATES. It is in one of them at any moment, so they add up to the
    time that passed. What a state means for a role: `stream.timed`."""

    def __init__(self, clock: Callable[[], float], name: str = "", spans: Spans | None = None):
        """`spans` takes each state and call under the actor's `name`."""
        self._clock, self._name, self._spans, self._state = clock, name, spans, "starved"
        self.restart(clock())
        if spans:
            spans.entered(name, self._state, self._since)

    def restart(self, now: float) -> None:
        """Count from `now` on."""
        self._since, self._seconds = now, dict.fromkeys(STATES, 0.0)

    def now(self) -> float:
        """By the clock it counts by."""
        return self._clock()

    def enter(self, state: str) -> float:
        """The actor is in `state` from now on; returns when that is."""
        now = self._clock()
        if state != self._state:
            self._seconds[self._state] += now - self._since
            self._state, self._since = state, now
            if self._spans:
                self._spans.entered(self._name, state, now)
        return now

    def called(self, call: str, of: Of, start: float, end: float) -> None:
        """The actor has answered a call."""
        if self._spans:
            self._spans.called(self._name, call, of, start, end)

    @asynccontextmanager
    async def call(self, call: str, of: Of) -> AsyncIterator[None]:
        """What is done inside is a call of the actor's."""
        start, end = self._clock(), CUT_OFF
        try:
            yield
            end = ""
        finally:
            self.called(call + end, of, start, self._clock())

    def seconds(self, state: str, now: float) -> float:
        """Spent in `state` from the last restart until `now`."""
        return self._seconds[state] + (now - self._since if state == self._state else 0.0)


class Window:
    """A file of the last `keep` lines at least: when it holds as many, it becomes the earlier one and a new one begins.
    Between them they never hold more than twice as many."""

    def __init__(self, run_dir: Path, keep: int, write: Callable[[Line], None]):
        """`write` adds a line to FILE in `run_dir`."""
        self._path, self._keep, self._write = run_dir / FILE, keep, write
        self._lines = self._path.read_bytes().count(b"\n") if self._path.exists() else 0

    def __call__(self, line: Line) -> None:
        if self._lines >= self._keep:
            self._path.replace(self._path.with_name(EARLIER))
            self._lines = 0
        self._write(line)
        self._lines += 1
