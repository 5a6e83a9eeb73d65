"""What the driver recorded of a run, put together: who was in which state when, and every call."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from async_opd.config.load import read_run
from async_opd.core.errors import RunMissing
from async_opd.core.reading import refused
from async_opd.core.run_dir import EARLIER_EVENTS, EARLIER_SPANS, EVENTS, SPANS, read_lines
from async_opd.telemetry.spans import Line, Of

LATEST = 1e11  # seconds of Unix time: the year 5138


class State(NamedTuple):
    """An actor was in one of `spans.STATES`. Times are Unix time, in seconds."""

    lane: str
    state: str
    start: float
    end: float


class Call(NamedTuple):
    """An actor was asked for something. `step` is that of the row of metrics that came next."""

    lane: str
    name: str
    of: Of
    start: float
    end: float
    step: int | None


class Recording(NamedTuple):
    """The last steps of a run."""

    lines: list[Line]
    events: list[dict[str, Any]]  # who was lost, who came and what was saved, within that time
    damaged: list[str]  # which lines of the files could not be read, and why


def recorded(run_dir: Path) -> Recording:
    """Read what there is of the run, which may be at work. Raises RunMissing."""
    read_run(run_dir, dict)
    with refused(f"{run_dir}", RunMissing):
        return _recorded(run_dir)


def _recorded(run_dir: Path) -> Recording:
    damaged: list[str] = []
    lines = [
        line for name in (EARLIER_SPANS, SPANS) for line in _records(run_dir / name, _line, damaged)
    ]
    if not lines:
        why = (
            "; ".join(damaged)
            or "a run keeps those of its last run.trace_steps steps, where that is not 0"
        )
        raise RunMissing(f"{run_dir / SPANS}: no spans: {why}")
    first, last = lines[0].since + lines[0].epoch, lines[-1].until + lines[-1].epoch
    events = (
        event
        for name in (EARLIER_EVENTS, EVENTS)
        for event in _records(run_dir / name, _event, damaged)
    )
    return Recording(lines, [event for event in events if first <= event["time"] <= last], damaged)


def _line(text: bytes) -> Line:
    """Decode a line. Raises ValueError, also for a time that is none."""
    line = msgspec.json.decode(text, type=Line)
    moments = [line.epoch, line.since, line.until, *(start for _, _, start in line.states)]
    moments += [moment for _, _, _, *ends in line.calls for moment in ends]
    if wrong := next((moment for moment in moments if abs(moment) > LATEST), None):
        raise ValueError(f"{wrong:g}: no time in seconds")
    return line


class _Event(Struct):
    """Of a line of events.jsonl: what is drawn."""

    time: float
    who: str
    what: str
    why: str = ""


def _event(text: bytes) -> dict[str, Any]:
    """Decode an event. Raises ValueError."""
    return msgspec.to_builtins(msgspec.json.decode(text, type=_Event))


def _records(path: Path, decode: Callable[[bytes], Any], damaged: list[str]) -> Iterator[Any]:
    """Read a file that may not be there; the last line may be half written."""
    if path.exists():
        lines = read_lines(
            path,
            decode,
            lambda number, error: damaged.append(f"{path}, line {number}: left out: {error}"),
        )
        yield from (record for _, record in lines)


def states(lines: list[Line]) -> Iterator[State]:
    """Give every span of every actor, those of one actor in order and end to end, but for time of
    which no line is left."""
    now: dict[str, tuple[str, float]] = {}  # of each actor: its state, since when
    until = float("nan")  # of the line before

    def ended(lane: str, end: float) -> Iterator[State]:
        state, start = now.pop(lane)
        if start < end:
            yield State(lane, state, start, end)

    for line in lines:
        since = line.since + line.epoch
        if since != until:  # lines are missing, or training started anew
            for lane in list(now):
                yield from ended(lane, until)
            now = {lane: (state, since) for lane, state in line.lanes.items()}
        for lane, state, start in line.states:
            if lane in now:
                yield from ended(lane, start + line.epoch)
            now[lane] = state, start + line.epoch
        until = line.until + line.epoch
    for lane in list(now):
        yield from ended(lane, until)


def calls(lines: list[Line]) -> list[Call]:
    """List every call, by its start."""
    return sorted(
        (
            Call(lane, name, of, start + line.epoch, end + line.epoch, line.step)
            for line in lines
            for lane, name, of, start, end in line.calls
        ),
        key=lambda call: (call.start, call.end),
    )
