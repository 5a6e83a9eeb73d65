"""What is measured and where it goes: one row a step to jsonl and the console, and to observers that can never slow
training."""

import itertools
import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

OBSERVER_BACKLOG = 1000  # rows an observer may lag behind before its rows are lost, and counted
ROLES = ("generators", "teachers", "verifier", "learner")  # of every run; some have more
STATES = ("busy", "starved", "blocked", "syncing", "down")

Row = dict[str, float | int | str | None]
Sink = Callable[[Row], None]


class Jsonl:
    """One JSON object a line; flushed by line so that a killed run keeps its rows."""

    def __init__(self, path: Path):
        self._file = path.open("w", buffering=1)

    def __call__(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


class Console:
    """A line a step, at most one in `every_s` seconds; a header every 20 lines."""

    COLUMNS = (  # title, key, width, format
        ("accuracy", "accuracy", 8, ".1%"),
        ("kl", "kl", 8, ".4f"),
        ("loss", "loss", 8, ".4f"),
        ("lag", "lag_mean", 5, ".1f"),
        ("max", "lag_max", 4, ".0f"),
        ("queue", "queue_ready", 6, "d"),
        ("gen tok/s", "generators_tokens_per_s", 10, ".0f"),
        ("teach tok/s", "teachers_tokens_per_s", 12, ".0f"),
        ("train tok/s", "trained_tokens_per_s", 12, ".0f"),
        ("busy: gen", "generators_busy", 9, ".0%"),
        ("teach", "teachers_busy", 5, ".0%"),
        ("verify", "verifier_busy", 6, ".0%"),
        ("learn", "learner_busy", 5, ".0%"),
        ("left, s", "left_s", 8, ".0f"),
    )

    def __init__(self, steps: int, every_s: float = 2.0):
        self._steps, self._every_s, self._last, self._lines = steps, every_s, 0.0, 0

    def __call__(self, row: Row) -> None:
        now = time.monotonic()
        if now - self._last < self._every_s and row["step"] not in (1, self._steps):
            return
        self._last = now
        cells = [f"{row['step']}/{self._steps}".rjust(11)]
        for _, key, width, spec in self.COLUMNS:
            cells.append(("-" if row[key] is None else format(row[key], spec)).rjust(width))
        if self._lines % 20 == 0:
            print(" ".join(["step".rjust(11), *(title.rjust(width) for title, _, width, _ in self.COLUMNS)]))
        print(" ".join(cells))
        sys.stdout.flush()
        self._lines += 1


class Observed:
    """Runs a sink that may block or raise on a thread of its own behind a bounded queue; `lost` counts missed rows."""

    def __init__(self, make: Callable[[], Sink]):
        self._queue: queue.Queue[Row | None] = queue.Queue(OBSERVER_BACKLOG)
        self.lost = 0
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True)
        self._thread.start()

    def __call__(self, row: Row) -> None:
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self.lost += 1

    def close(self, timeout_s: float) -> None:
        """Give the observer `timeout_s` seconds to finish; then leave it behind."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self, make: Callable[[], Sink]) -> None:
        sink = None
        while (row := self._queue.get()) is not None:
            try:
                sink = sink or make()
                sink(row)
            except Exception as error:  # whatever an observer does, training goes on
                if not self.lost:
                    print(f"observer: {error}", file=sys.stderr)
                self.lost += 1


class ActorTime:
    """The seconds one actor has spent in each of STATES. It is in one of them at any moment, so they add up to the
    time that passed. What a state means for a role: `stream.timed`."""

    def __init__(self, clock: Callable[[], float]):
        self._clock, self._state = clock, "starved"
        self.restart(clock())

    def restart(self, now: float) -> None:
        """Count from `now` on."""
        self._since, self._seconds = now, dict.fromkeys(STATES, 0.0)

    def enter(self, state: str) -> None:
        """The actor is in `state` from now on."""
        now = self._clock()
        self._seconds[self._state] += now - self._since
        self._state, self._since = state, now

    def seconds(self, state: str, now: float) -> float:
        """Spent in `state` from the last restart until `now`."""
        return self._seconds[state] + (now - self._since if state == self._state else 0.0)


class Meter:
    """Counts tokens by role and each actor's time, and turns step results into rows. Keeps totals, never rows."""

    def __init__(self, sinks: list[Sink], clock: Callable[[], float] = time.monotonic):
        self._sinks, self._clock = sinks, clock
        self._actors: dict[str, list[ActorTime]] = {role: [] for role in ROLES}
        self.start()

    def actor(self, role: str) -> ActorTime:
        """Account for one more actor of `role`."""
        self._actors.setdefault(role, []).append(ActorTime(self._clock))
        return self._actors[role][-1]

    def count(self, role: str, tokens: int) -> None:
        """`tokens` more have been through `role`."""
        self._tokens[role] += tokens

    def start(self) -> None:
        """Training starts now: what comes before is start-up."""
        self._started = self._last = self._clock()
        self._steps, self._max_lag = 0, 0
        self._tokens: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        for actor in itertools.chain(*self._actors.values()):
            actor.restart(self._started)
        self._seconds = self._mean_seconds(self._started)

    def step(self, step: int, steps: int, metrics: dict[str, float], **more: float | int | None) -> None:
        """One row: `metrics` of the learner, rates and shares of time since the last row, and `more`."""
        now = self._clock()
        passed, elapsed = now - self._last, now - self._started
        self._steps, self._max_lag = self._steps + 1, max(self._max_lag, int(metrics["lag_max"]))
        self._tokens["trained"] += int(metrics["tokens"] + metrics.get("tokens_taught", 0))
        rates = {
            f"{role}_tokens_per_s": (self._tokens[role] - self._seen[role]) / passed
            for role in ("generators", "teachers", "trained")
        }
        seconds = self._mean_seconds(now)
        shares = {key: (seconds[key] - self._seconds[key]) / passed for key in seconds}
        self._seen, self._seconds, self._last = self._tokens.copy(), seconds, now
        row = {"step": step, "elapsed_s": elapsed, "left_s": elapsed / step * (steps - step)} | metrics | rates
        row |= shares | more
        for sink in self._sinks:
            sink(row)

    def summary(self) -> Row:
        """Totals from the start of training to the last row; shares of time are means over it."""
        elapsed = self._last - self._started
        return {
            "steps": self._steps,
            "trained_tokens": self._tokens["trained"],
            "trained_tokens_per_s": self._tokens["trained"] / elapsed if self._steps else 0.0,
            "max_lag_seen": self._max_lag,
            "wall_s": elapsed,
            **{key: seconds / elapsed if self._steps else 0.0 for key, seconds in self._seconds.items()},
        }

    def _mean_seconds(self, now: float) -> dict[str, float]:
        """Seconds from the start until `now` by role and state, averaged over the role's actors."""
        return {
            f"{role}_{state}": sum(actor.seconds(state, now) for actor in actors) / max(len(actors), 1)
            for role, actors in self._actors.items()
            for state in STATES
        }


def time_table(summary: Row) -> str:
    """Where each role's time went, a line a role."""
    roles = [key.removesuffix("_busy") for key in summary if key.endswith("_busy")]
    lines = ["share of time".ljust(18) + "".join(state.rjust(9) for state in STATES)]
    lines += [role.ljust(18) + "".join(f"{summary[f'{role}_{state}']:9.1%}" for state in STATES) for role in roles]
    return "\n".join(lines)
