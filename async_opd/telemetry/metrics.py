"""Measurements and where they go: one row a step to observers, a file and the console among them,
which can never slow or stop training. What a key means: `async_opd.telemetry.metric_names`."""

import errno
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from async_opd.core.printing import say
from async_opd.core.wire import trained_tokens
from async_opd.telemetry.spans import STATES, ActorTime, Spans

OBSERVER_BACKLOG = 1000  # rows an observer may lag behind before its rows are lost, and counted
CLOSE_S = 5.0  # for all observers together to take, at the end of a run, what they were given
ROLES = ("generators", "teachers", "verifier", "learner")  # of every run; some have more

Row = dict[str, Any]  # of JSON: numbers by key, None where nothing was measured; or an event
# takes rows, or what else is observed; one that has a `close` is closed behind the last
Sink = Callable[[Any], None]


class Jsonl:
    """A file of one JSON object a line, in it before the next is taken, whole or not at all. A file
    that could not be written is tried again with the next row."""

    def __init__(
        self, path: Path, encode: Callable[[Any], bytes] = lambda row: json.dumps(row).encode()
    ):
        self._path, self._encode = path, encode
        self._begun = False

    def __call__(self, row: Any) -> None:
        line = self._encode(row) + b"\n"
        with self._path.open("a+b", buffering=0) as file:
            if not self._begun and file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill left half a row: none is glued to it
                    line = b"\n" + line
            self._begun = True
            written = file.write(line)
            if written < len(line):  # the disk filled up within the line
                file.truncate(file.tell() - written)
                raise OSError(
                    errno.ENOSPC, f"{written} of {len(line)} bytes of a row fit", str(self._path)
                )


class Rotating:
    """A file that becomes the `earlier` one when it holds so many bytes, so that between them they
    hold at least as many of the last, and never much more than twice as many."""

    def __init__(self, path: Path, earlier: str, most_bytes: int, write: Sink):
        """`write` adds a row to the file at `path`."""
        self._path = path
        self._most_bytes = most_bytes
        self._write = write
        self._earlier = path.with_name(earlier)

    def __call__(self, row: Any) -> None:
        if self._path.exists() and self._path.stat().st_size >= self._most_bytes:
            self._path.replace(self._earlier)
        self._write(row)


class Observed:
    """A sink that may block or raise, run by a thread of its own behind a bounded queue."""

    def __init__(self, name: str, make: Callable[[], Sink]):
        """`make` is tried again with each row until it gives a sink; `name` is what messages call
        it."""
        self.name = name
        # a row, an Event to be set behind those before it, or None at the end
        self._rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._put = 0
        self._taken = 0
        self._complained = False
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def __call__(self, row: Any) -> None:
        self._put += 1
        if self._rows.qsize() < OBSERVER_BACKLOG:
            self._rows.put(row)

    @property
    def lost(self) -> int:
        """Rows that were handed to it and that it has not taken; those still waiting among them."""
        return self._put - self._taken

    def reach(self) -> threading.Event:
        """What is set once it is through with the rows so far."""
        reached = threading.Event()
        self._rows.put(reached)
        return reached

    def end(self) -> None:
        """Announce that no row comes after this."""
        self._rows.put(None)

    def join(self, timeout_s: float) -> None:
        """After `end`: give it `timeout_s` seconds to take what waits; then leave it behind."""
        self._thread.join(max(timeout_s, 0))

    def _run(self, make: Callable[[], Sink]) -> None:
        sink = None
        while (row := self._rows.get()) is not None:
            if isinstance(row, threading.Event):
                row.set()
                continue
            with self._survived():
                sink = sink or make()
                sink(row)
                self._taken += 1
        with self._survived():
            getattr(sink, "close", lambda: None)()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever an observer does, training goes on
            if not self._complained:
                self._complained = True
                say(f"observer {self.name}: {type(error).__name__}: {error}", sys.stderr)


def caught_up(observers: Iterable[Observed]) -> None:
    """Give them CLOSE_S seconds to be through with what was handed to them."""
    deadline = time.monotonic() + CLOSE_S
    for reached in [observer.reach() for observer in observers]:
        reached.wait(max(deadline - time.monotonic(), 0))


@contextmanager
def observed(makers: Mapping[str, Callable[[], Sink]]) -> Iterator[list[Observed]]:
    """Start an observer for each of `makers`; on leaving they have CLOSE_S seconds to take what was
    handed to them."""
    observers = [Observed(name, make) for name, make in makers.items()]
    try:
        yield observers
    finally:
        deadline = time.monotonic() + CLOSE_S
        for observer in observers:
            observer.end()
        for observer in observers:
            observer.join(deadline - time.monotonic())


class Meter:
    """The count of tokens by role and of each actor's time, which turns step results into rows. It
    keeps totals, never rows."""

    def __init__(
        self,
        sinks: list[Sink],
        clock: Callable[[], float] = time.monotonic,
        spans: Callable[[Any], None] | None = None,
        record: Callable[[Any], None] = lambda _: None,
    ):
        """`spans`, where they are recorded, takes what each actor did, a line a step; `record`
        takes the trajectories that the learner recorded in a step."""
        self._sinks = sinks
        self._clock = clock
        self.record = record
        self._spans = Spans(spans, clock) if spans else None
        self._actors: dict[str, list[ActorTime]] = {role: [] for role in ROLES}
        self.start()

    @property
    def last_step(self) -> int:
        """The step of the last row."""
        return self._first + self._steps

    def actor(self, role: str, name: str = "") -> ActorTime:
        """Account for one more actor of `role`, which has no `name` where it is the only one."""
        self._actors.setdefault(role, []).append(ActorTime(self._clock, name or role, self._spans))
        return self._actors[role][-1]

    def count(self, role: str, tokens: int) -> None:
        """Count `tokens` more that have been through `role`."""
        self._tokens[role] += tokens

    def start(self, version: int = 0) -> None:
        """Start training now, behind step `version`: what comes before is start-up."""
        self._first = version
        self._started = self._last = self._clock()
        self._steps, self._max_lag = 0, 0
        self._tokens: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        for actor in itertools.chain(*self._actors.values()):
            actor.restart(self._started)
        self._seconds = self._mean_seconds(self._started)
        self.flush(self._started)

    def step(
        self, step: int, steps: int, metrics: dict[str, float], **more: float | int | None
    ) -> None:
        """Make one row: `metrics` of the learner, rates and shares of time since the last row, and
        `more`."""
        now = self._clock()
        passed, elapsed = now - self._last, now - self._started
        self._steps, self._max_lag = self._steps + 1, max(self._max_lag, int(metrics["lag_max"]))
        self._tokens["trained"] += int(trained_tokens(metrics))
        rates = {
            f"{role}_tokens_per_s": (self._tokens[role] - self._seen[role]) / passed
            for role in ("generators", "teachers", "trained")
        }
        seconds = self._mean_seconds(now)
        shares = {key: (seconds[key] - self._seconds[key]) / passed for key in seconds}
        self._seen = self._tokens.copy()
        self._seconds = seconds
        self._last = now
        row: Row = {
            "step": step,
            "elapsed_s": elapsed,
            "left_s": elapsed / (step - self._first) * (steps - step),
            **{key: None if math.isnan(x) else x for key, x in metrics.items()},
            **rates,
            **shares,
            **more,
        }
        for sink in self._sinks:
            sink(row)
        self.flush(now, row)

    def flush(self, until: float | None = None, row: Row | None = None) -> None:
        """Hand over the spans up to now, or up to a moment that has just passed, with the `row`
        that belongs to it."""
        if self._spans:
            self._spans.flush(self._clock() if until is None else until, row or {})

    def summary(self) -> Row:
        """Sum up training from its start to the last row; shares of time are means over it."""
        elapsed = self._last - self._started
        return {
            "steps": self._steps,
            "trained_tokens": self._tokens["trained"],
            "trained_tokens_per_s": self._tokens["trained"] / elapsed if self._steps else 0.0,
            "max_lag_seen": self._max_lag,
            "wall_s": elapsed,
            **{
                key: seconds / elapsed if self._steps else 0.0
                for key, seconds in self._seconds.items()
            },
        }

    def _mean_seconds(self, now: float) -> dict[str, float]:
        """Average the seconds from the start until `now` by role and state over the role's
        actors."""
        return {
            f"{role}_{state}": sum(actor.seconds(state, now) for actor in actors)
            / max(len(actors), 1)
            for role, actors in self._actors.items()
            if actors  # a learner that scores has no teachers beside it
            for state in STATES
        }


def roles_of(row: Iterable[str]) -> list[str]:
    """List the roles whose time a row, or a summary, accounts for."""
    return [key.removesuffix("_busy") for key in row if key.endswith("_busy")]


def time_table(summary: Row) -> str:
    """Say where each role's time went, a line a role."""
    titles = "share of time".ljust(18) + "".join(state.rjust(9) for state in STATES)
    lines = (
        role.ljust(18) + "".join(f"{summary[f'{role}_{state}']:9.1%}" for state in STATES)
        for role in roles_of(summary)
    )
    return "\n".join([titles, *lines])
