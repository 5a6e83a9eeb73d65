"""The screen of a run, drawn in place at the bottom of a terminal.

rich lays it out, but does not draw it. `rich.live.Live` hides the cursor, which a process that is
killed leaves hidden; it writes in the thread of whoever prints, under a lock, so a terminal that
stands still holds up the whole process; it needs a last frame as high as the picture, however low
the terminal is, and a line that is printed without an end is drawn into. What it would save are the
two sequences that `_draw` writes.
"""

import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from itertools import accumulate

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from async_opd.core.printing import write
from async_opd.telemetry.console.lines import event_line
from async_opd.telemetry.metrics import STATES, Row, roles_of

EVERY_S = 1.0  # between two drawings, unless something is said
EVENTS = 4  # on the screen; older ones have gone above
# pieces of text a terminal that takes nothing may be behind before the oldest are lost
BACKLOG = 1000
MARKS = dict(zip(STATES, ("█green", "░yellow", "▒magenta", "▓cyan", "×red"), strict=True))
SPARKS = "▁▂▃▄▅▆▇█"
NUMBERS = (
    ("accuracy", "accuracy", ".1%"),
    ("KL", "kl", ".4f"),
    ("loss", "loss", ".4f"),
    ("lr", "lr", ".1e"),
)


class Screen:
    """The last row and the last events; what else is printed while it is up goes above it.

    The cursor stays where it would be without it, in the line below, and is never hidden: whatever
    ends the process leaves the terminal fit for use. One thread of its own writes, so a terminal
    that stands still blocks nobody else.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._terminal = sys.stdout
        self._height = 0
        self._last: tuple[Row, float] | None = None  # a row, and when it came
        self._events: tuple[Row, ...] = ()
        self._above: deque[str] = deque(maxlen=BACKLOG)
        self._ended, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, row: Row) -> None:
        if "what" not in row:
            self._last = row, time.monotonic()
            return
        self._events = (*self._events, row)
        if self._last is None or len(self._events) > EVENTS:
            self.say(event_line(self._events[0]) + "\n")
            self._events = self._events[1:]

    def say(self, text: str) -> None:
        """Print whole lines above."""
        self._above.append(text)
        self._wake.set()

    def close(self) -> None:
        """Draw for the last time, and give the terminal back."""
        self._ended = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        with ExitStack() as given_back:  # whatever ends this thread
            given_back.enter_context(redirect_stdout(_Above(self.say)))
            if sys.stderr.isatty():
                given_back.enter_context(redirect_stderr(_Above(self.say)))
            last = False
            while not last:
                last = self._ended
                self._wake.clear()
                with suppress(OSError):  # a terminal that is gone
                    self._draw(still=last)
                self._wake.wait(0 if last else EVERY_S)

    def _draw(self, still: bool) -> None:
        width, height = os.get_terminal_size(self._terminal.fileno())
        lines = []
        if self._last:  # a column and a line are left free: a full one would wrap, or scroll
            row, came = self._last
            shown = picture(row, self._events, self._steps, 0 if still else time.monotonic() - came)
            lines = rendered(shown, (width or 80) - 1)[: (height or 24) - 1]  # 0: not known
        up = f"\x1b[{self._height}F" if self._height else ""
        printed = "".join(self._above.popleft() for _ in range(len(self._above)))
        above = f"\x1b[J{printed}" if printed else ""
        write(self._terminal, up + above + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self._height = len(lines)


class _Above(io.TextIOBase):
    """A stand-in for stdout or stderr: whole lines go above the screen. It is no file, so `say`
    writes to it too."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._rest = say, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._say("".join(f"{line}\n" for line in lines))
        return len(text)


def rendered(shown: RenderableType, width: int) -> list[str]:
    """Render `shown` into lines, none wider than `width`; rich sees to NO_COLOR."""
    to = io.StringIO()
    Console(file=to, width=width, force_terminal=True, legacy_windows=False).print(shown)
    return [line.rstrip() for line in to.getvalue().splitlines()]


def picture(row: Row, events: Sequence[Row], steps: int, since_s: float) -> RenderableType:
    """Compose the screen, `since_s` seconds after `row` came."""
    gone, left = row["elapsed_s"] + since_s, max(row["left_s"] - since_s, 0)
    bar = Table.grid(
        Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), expand=True, padding=(0, 1)
    )
    bar.add_row(
        Text(f"step {row['step']}/{steps}", "bold"),
        ProgressBar(steps, row["step"]),
        Text(f"{_clock(left)} left, {_clock(gone)} gone"),
    )
    body = Table.grid(
        Column(
            no_wrap=True, style="bold", min_width=max(map(len, _names(row).values()), default=0)
        ),
        Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        expand=True,
        padding=(0, 1),
    )
    lines = {
        "learns": _cells(row, NUMBERS),
        "queue": _queue(row),
        "lag": _lag(row),
        "events": "\n".join(map(event_line, events)) or "none",
    }
    for title, text in lines.items():
        body.add_row(title, Text(text))
    return Group(bar, _roles(row), body)


def _roles(row: Row) -> Table:
    """Draw a line a role: its tokens per second, where its time went since the last row, and the
    share it was busy."""
    table = Table.grid(
        Column(no_wrap=True, style="bold"),
        Column(no_wrap=True, justify="right"),
        Column(ratio=1, no_wrap=True),
        Column(no_wrap=True, justify="right"),
        expand=True,
        padding=(0, 1),
    )
    legend = Text("  ").join(
        Text(f"{MARKS[state][0]} {state}", MARKS[state][1:]) for state in STATES
    )
    table.add_row("", "tokens/s", legend, "busy")
    for role, name in _names(row).items():
        rate = row.get(f"{'trained' if role == 'learner' else role}_tokens_per_s")
        shares = [row[f"{role}_{state}"] for state in STATES]
        table.add_row(
            name, "" if rate is None else f"{rate:,.0f}", _Bar(shares), f"{shares[0]:.0%}"
        )
    return table


def _names(row: Row) -> dict[str, str]:
    """List the roles that `row` accounts for, and what they are called."""
    return {role: role.replace("_", " ") for role in roles_of(row)}


class _Bar:
    """Shares of time as a bar of the width there is."""

    def __init__(self, shares: Sequence[float]):
        self._shares = shares

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ends = [round(options.max_width * share) for share in accumulate(self._shares)]
        bar = Text(no_wrap=True)
        for state, start, end in zip(STATES, [0, *ends], ends, strict=False):
            bar.append(MARKS[state][0] * (end - start), MARKS[state][1:])
        yield bar


def _queue(row: Row) -> str:
    """Say how full the queue is."""
    keys = ("queue_ready", "queue_outstanding", "queue_slots", "dropped")
    ready, outstanding, slots, dropped = (row.get(key, "-") for key in keys)
    return f"{ready} ready, {outstanding} of {slots} slots taken, {dropped} dropped"


def _lag(row: Row) -> str:
    """Draw the histogram: a mark for each lag from 0 to the bound, · where nothing was trained."""
    counts = [value for key, value in row.items() if key.startswith("tokens_lag_")]
    most = max(counts, default=0)
    marks = "".join(
        SPARKS[int(count / most * (len(SPARKS) - 1))] if count else "·" for count in counts
    )
    bars = f"0 {marks} {len(counts) - 1}   " if counts else ""
    return bars + _cells(row, (("mean", "lag_mean", ".1f"), ("largest", "lag_max", ".0f")))


def _cells(row: Row, cells: Sequence[tuple[str, str, str]]) -> str:
    """Write numbers by title, key and format; - for what the row lacks."""
    values = ((title, row.get(key), spec) for title, key, spec in cells)
    return "   ".join(
        f"{title} {'-' if value is None else format(value, spec)}" for title, value, spec in values
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
