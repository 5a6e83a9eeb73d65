"""Time of every actor, as the driver sees it: how much it has spent in each state, and, of the last
steps of a run, its states and calls one by one in `spans.jsonl`, which `async-opd trace` shows."""

from collections.abc import Callable
from pathlib import Path
from time import time
from typing import Any

import msgspec
from msgspec import Struct

from async_opd.core.run_dir import EARLIER_SPANS, SPANS

STATES: tuple[str, ...] = ("busy", "starved", "blocked", "syncing", "down")
# so often at most: a file that is opened for every short step costs more than what is written to it
HAND_OVER_S = 0.2
CUT_OFF = ", cut off"  # behind the name of a call that ended without an answer
COUNTED = (
    "queue_ready",
    "queue_outstanding",
    "generators_tokens_per_s",
    "teachers_tokens_per_s",
    "trained_tokens_per_s",
    "lag_mean",
    "lag_max",
)  # of a row of metrics

Of = str | int | tuple[str, ...]  # what a call is of: a group, a version, the groups of a step


class Line(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that happened from `since` to `until`, in seconds of the driver's clock; with
    `epoch`, Unix time."""

    step: int | None  # whose row of metrics came at `until`; None: training starts or ends there
    epoch: float
    since: float
    until: float
    lanes: dict[str, str]  # state of every actor at `since`
    states: list[tuple[str, str, float]]  # actor, the state it entered, when
    # actor, call, what of, start, end; in the line where they end
    calls: list[tuple[str, str, Of, float, float]]
    counters: dict[str, float | None]  # COUNTED


def encode(lines: list[Line]) -> bytes:
    """Encode lines as they stand in the file, but for the last one's end."""
    return b"\n".join(map(msgspec.json.encode, lines))


class Spans:
    """A collector of what happens, which hands it to `sink` a line a step, several at once where
    steps are short."""

    def __init__(self, sink: Callable[[list[Line]], None], clock: Callable[[], float]):
        self._sink, self._since = sink, clock()
        self._epoch, self._handed = time() - self._since, self._since
        self._lines: list[Line] = []
        self._lanes: dict[str, str] = {}
        self._at_start: dict[str, str] = {}
        self._states: list[tuple[str, str, float]] = []
        # add to it: actor, call, what of, start, end
        self.calls: list[tuple[str, str, Of, float, float]] = []

    def entered(self, lane: str, state: str, since: float) -> None:
        """Record that the actor is in another state since then."""
        self._lanes[lane] = state
        self._states.append((lane, state, since))

    def flush(self, until: float, row: dict[str, Any]) -> None:
        """Close the line of all that was before `until`. `row` came then; where it is empty, there
        may come none for long."""
        if not self._lanes:  # nobody is there yet
            self._since = until
            return
        self._lines.append(
            Line(
                step=row.get("step"),
                epoch=self._epoch,
                since=self._since,
                until=until,
                lanes=self._at_start,
                states=self._states,
                calls=self.calls[:],
                counters={key: row[key] for key in COUNTED if key in row},
            )
        )
        self.calls.clear()
        self._since = until
        self._at_start = self._lanes.copy()
        self._states = []
        if not row or until - self._handed >= HAND_OVER_S:
            self._sink(self._lines)
            self._lines, self._handed = [], until


class ActorTime:
    """The seconds one actor has spent in each of STATES. It is in one of them at any moment, so
    they add up to the time that passed."""

    def __init__(self, clock: Callable[[], float], name: str = "", spans: Spans | None = None):
        """`spans` takes each state and call under the actor's `name`."""
        self.now = clock
        self._name = name
        self._spans = spans
        self._state = "starved"
        self.restart(clock())
        if spans:
            spans.entered(name, self._state, self._since)

    def restart(self, now: float) -> None:
        """Count from `now` on."""
        self._since, self._seconds = now, dict.fromkeys(STATES, 0.0)

    def enter(self, state: str) -> float:
        """Put the actor into `state` from now on; returns when that is."""
        now = self.now()
        if state != self._state:
            self._seconds[self._state] += now - self._since
            self._state, self._since = state, now
            if self._spans:
                self._spans.entered(self._name, state, now)
        return now

    def called(self, call: str, of: Of, start: float, end: float) -> None:
        """Record that the actor has answered a call."""
        if self._spans:
            self._spans.calls.append((self._name, call, of, start, end))

    def seconds(self, state: str, now: float) -> float:
        """Count the seconds in `state` from the last restart until `now`."""
        return self._seconds[state] + (now - self._since if state == self._state else 0.0)


class Window:
    """A file of the last `keep` lines at least: when it holds as many, it becomes the earlier one
    and a new one begins. Between them they never hold more than twice as many."""

    def __init__(self, run_dir: Path, keep: int, write: Callable[[list[Line]], None]):
        """`write` adds lines to SPANS in `run_dir`."""
        self._path = run_dir / SPANS
        self._keep = keep
        self._write = write
        self._held = self._path.read_bytes().count(b"\n") if self._path.exists() else 0

    def __call__(self, lines: list[Line]) -> None:
        while lines:
            if self._held >= self._keep:
                self._path.replace(self._path.with_name(EARLIER_SPANS))
                self._held = 0
            room = self._keep - self._held
            self._write(lines[:room])
            self._held += len(lines[:room])
            lines = lines[room:]
