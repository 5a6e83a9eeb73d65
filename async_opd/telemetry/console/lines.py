"""Plain lines."""

import sys
import time

from async_opd.core.printing import write
from async_opd.telemetry.metrics import Row


def event_line(event: Row) -> str:
    """Put an event into one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return f"{clock} {event['who']}: {event['what']}{event['why'] and ': '}{event['why']}"


class Lines:
    """A line a step, at most one in `every_s` seconds, with a header every 20; and a line an
    event."""

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
        self._steps = steps
        self._every_s = every_s
        self._last = 0.0
        self._lines = 0

    def __call__(self, row: Row) -> None:
        if "what" in row:
            write(sys.stdout, event_line(row) + "\n")
            return
        now = time.monotonic()
        if now - self._last < self._every_s and row["step"] not in (1, self._steps):
            return
        self._last = now
        cells = [f"{row['step']}/{self._steps}".rjust(11)] + [
            ("-" if row.get(key) is None else format(row[key], spec)).rjust(width)
            for _, key, width, spec in self.COLUMNS
        ]
        titles = ["step".rjust(11), *(title.rjust(width) for title, _, width, _ in self.COLUMNS)]
        lines = [titles, cells] if self._lines % 20 == 0 else [cells]
        write(sys.stdout, "".join(" ".join(line) + "\n" for line in lines))
        self._lines += 1
