"""Where numbers go: one row a step to jsonl and the console, and to observers that can never slow training."""

import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

OBSERVER_BACKLOG = 1000  # rows an observer may lag behind before its rows are lost, and counted

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


class Meter:
    """Counts tokens by role and turns step results into rows."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks
        self._tokens: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._laps: Counter[str] = Counter()
        self._rows: list[Row] = []
        self._started = self._last = self._lap = time.monotonic()

    def count(self, role: str, tokens: int) -> None:
        """`tokens` more have been through `role`."""
        self._tokens[role] += tokens

    def start(self) -> None:
        """Training starts now: what comes before is start-up."""
        self._started = self._last = self._lap = time.monotonic()

    def lap(self, what: str) -> None:
        """The loop spent the time since the last lap on `what`; shows as `loop_<what>_s` of the step."""
        now = time.monotonic()
        self._laps[f"loop_{what}_s"] += now - self._lap
        self._lap = now

    def step(self, step: int, steps: int, metrics: dict[str, float], **more: float | int | None) -> None:
        """One row: `metrics` of the learner, rates since the last row, and `more`."""
        now = time.monotonic()
        self._tokens["trained"] += int(metrics["tokens"])
        rates = {
            f"{role}_tokens_per_s": (self._tokens[role] - self._seen[role]) / (now - self._last)
            for role in ("generators", "teachers", "trained")
        }
        self._seen, self._last = self._tokens.copy(), now
        elapsed = now - self._started
        row = {"step": step, "elapsed_s": elapsed, "left_s": elapsed / step * (steps - step)} | metrics | rates | more
        row |= self._laps
        self._laps.clear()
        self._rows.append(row)
        for sink in self._sinks:
            sink(row)

    def summary(self) -> Row:
        """Totals of the run so far."""
        elapsed = self._last - self._started
        return {
            "steps": len(self._rows),
            "trained_tokens": self._tokens["trained"],
            "trained_tokens_per_s": self._tokens["trained"] / elapsed if self._rows else 0.0,
            "max_lag_seen": int(max((row["lag_max"] for row in self._rows), default=0)),
            "wall_s": elapsed,
        }
