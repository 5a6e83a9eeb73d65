"""Trace events (the JSON format of Chrome and Perfetto) of what was recorded.

A process of the trace is a role, a thread is an actor with its states, which follow one another.
Its calls lie below, on as many more threads as there were calls at once: slices of one thread must
not overlap. Groups that wait in the queue have threads of their own. Arrows follow a group from
call to call into the step that trained it.
"""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any, NamedTuple

from async_opd.tools.trace.read import Call, Recording, calls, states

Event = dict[str, Any]
DRIVER = "driver"
LEARNER = "learner"
QUEUE = "queue"
FIRST = (DRIVER, LEARNER, QUEUE, "generator")  # from the top; then the other roles
# What a call is of, where that is no group.
# "checkpoint": of a run that an earlier version recorded
SAVES = ("save", "save_whole", "save_state", "checkpoint")
OF: dict[str, str] = dict.fromkeys(("update", "send_weights", *SAVES), "version")
OF |= {"step": "groups"}
COUNTERS = {
    "queue": {"ready": "queue_ready", "outstanding": "queue_outstanding"},
    "tokens/s": {role: f"{role}_tokens_per_s" for role in ("generators", "teachers", "trained")},
    "lag": {"mean": "lag_mean", "max": "lag_max"},
}


class Trained(NamedTuple):
    """A group on its way to the step that trained it, as far as it was recorded."""

    calls: list[Call]  # generate, score and check, and the wait in the queue
    step: Call


def trace(recorded: Recording, name: str) -> dict[str, Any]:
    """Make the object that is written as JSON. Its clock starts with the first line."""
    origin = recorded.lines[0].since + recorded.lines[0].epoch
    every_call = calls(recorded.lines)
    groups = list(trained(every_call))
    threads = _Threads(origin)
    for state in states(recorded.lines):
        threads.slice(
            state.lane, threads.of(state.lane), state.state, "state", state.start, state.end, {}
        )
    waits = [call for group in groups for call in group.calls if call.lane == QUEUE]
    for call in sorted([*every_call, *waits], key=lambda call: call.start):
        threads.call(call)
    for number, group in enumerate(groups, 1):
        threads.arrows(number, group)
    threads.instants(recorded.events)
    for line in recorded.lines:
        threads.counters(line.until + line.epoch, line.counters)
    steps = [line.step for line in recorded.lines if line.step is not None]
    return {
        "traceEvents": [*threads.names(), *threads.events],
        "displayTimeUnit": "ms",
        "otherData": {
            "run": name,
            "began": datetime.fromtimestamp(origin, UTC).isoformat(),
            "first_step": min(steps, default=None),
            "last_step": max(steps, default=None),
            "damaged": recorded.damaged,
        },
    }


def trained(every_call: list[Call]) -> Iterator[Trained]:
    """Follow every group of every step. What it was asked for before it was issued anew is no part
    of it."""
    asked: dict[object, list[Call]] = defaultdict(list)
    for call in every_call:
        if call.name in ("generate", "score", "check"):
            asked[call.of].append(call)
    for step in every_call:
        if (step.lane, step.name) != (LEARNER, "step") or not isinstance(step.of, tuple):
            continue
        for id in step.of:
            before = [call for call in asked[id] if call.end <= step.start]
            last = max((n for n, call in enumerate(before) if call.name == "generate"), default=0)
            ready = max((call.end for call in before), default=step.start)
            wait = (
                [Call(QUEUE, "wait", id, ready, step.start, step.step)]
                if step.start - ready > 1e-6
                else []
            )
            yield Trained([*before[last:], *wait], step)


class _Threads:
    """Numbers processes and threads, and draws on them."""

    def __init__(self, origin: float):
        self._origin = origin
        self.events: list[Event] = []
        self._processes: dict[str, int] = {role: number for number, role in enumerate(FIRST, 1)}
        # By actor and row: 0 has its states, the others its calls.
        self._threads: dict[tuple[str, int], int] = {}
        self._numbers = count(1001)  # of threads: never that of a process
        # By actor: until when which row of calls is taken.
        self._taken: dict[str, dict[int, float]] = defaultdict(dict)
        self._drawn: dict[Call, int] = {}  # the thread of each call

    def of(self, lane: str, row: int = 0) -> int:
        """Number the thread of an actor's states, or one of those of its calls."""
        if (lane, row) not in self._threads:
            self._threads[lane, row] = next(self._numbers)
            self._processes.setdefault(_role(lane), len(self._processes) + 1)
        return self._threads[lane, row]

    def slice(
        self, lane: str, tid: int, name: str, kind: str, start: float, end: float, args: Event
    ) -> None:
        place = self._place(lane, tid, start)
        place["dur"] = self._micros(end) - place["ts"]
        self.events.append({"ph": "X", "name": name, "cat": kind, "args": args, **place})

    def call(self, call: Call) -> None:
        """Draw a call on the first row that is free: they come by their starts."""
        taken = self._taken[call.lane]
        row = next(row for row in count(1) if taken.get(row, call.start) <= call.start)
        taken[row] = call.end
        args = {} if call.of == "" else {OF.get(call.name, "group"): call.of}
        args |= {} if call.step is None else {"step": call.step}
        tid = self._drawn[call] = self.of(call.lane, row)
        self.slice(call.lane, tid, call.name, "call", call.start, call.end, args)

    def arrows(self, number: int, group: Trained) -> None:
        """Lead through the group's calls into its step."""
        for place, call in enumerate(group.calls):
            self._arrow(number, {"ph": "t" if place else "s"}, call)
        if group.calls:
            self._arrow(number, {"ph": "f", "bp": "e"}, group.step)

    def _arrow(self, number: int, phase: Event, call: Call) -> None:
        self.events.append(
            {
                **phase,
                "id": number,
                "name": "group",
                "cat": "group",
                **self._place(call.lane, self._drawn[call], call.start),
            }
        )

    def instants(self, events: list[Event]) -> None:
        """Draw who was lost, who came, and what was saved: a line from top to bottom each."""
        self.events += [
            {
                "ph": "i",
                "s": "g",
                "name": f"{event['who']}: {event['what']}",
                "cat": "event",
                **self._place(DRIVER, self.of(DRIVER), event["time"]),
                "args": {"why": event["why"]},
            }
            for event in events
        ]

    def counters(self, time: float, row: dict[str, float | None]) -> None:
        place = self._place(DRIVER, self.of(DRIVER), time)
        for name, series in COUNTERS.items():
            values = {key: row[of] for key, of in series.items() if row.get(of) is not None}
            if values:
                self.events.append({"ph": "C", "name": name, **place, "args": values})

    def names(self) -> Iterator[Event]:
        """Say what a viewer shows beside the threads, and in which order."""
        for role in {_role(lane): None for lane, _ in self._threads}:
            yield from self._named(
                "process", role, self._processes[role], {"pid": self._processes[role], "tid": 0}
            )
        for order, (lane, row) in enumerate(sorted(self._threads, key=_in_order)):
            name = f"{lane}, {'place' if lane == QUEUE else 'call'} {row}" if row else lane
            yield from self._named(
                "thread",
                name,
                order,
                {"pid": self._processes[_role(lane)], "tid": self._threads[lane, row]},
            )

    def _named(self, kind: str, name: str, order: int, place: Event) -> Iterator[Event]:
        yield {"ph": "M", "name": f"{kind}_name", **place, "args": {"name": name}}
        yield {"ph": "M", "name": f"{kind}_sort_index", **place, "args": {"sort_index": order}}

    def _place(self, lane: str, tid: int, time: float) -> Event:
        return {"pid": self._processes[_role(lane)], "tid": tid, "ts": self._micros(time)}

    def _micros(self, time: float) -> int:
        return round((time - self._origin) * 1e6)


def _role(lane: str) -> str:
    return lane.partition(" ")[0]


def _in_order(thread: tuple[str, int]) -> tuple:
    """Order by number: generator 10 comes behind generator 9; a server's by its address."""
    lane, row = thread
    role, _, index = lane.partition(" ")
    return role, int(index) if index.isdecimal() else 0, lane, row
