"""Admission slots and the replay-free queue: between them the lag bound holds exactly."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from async_opd.core.aio import until
from async_opd.core.errors import TimedOut
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import Prompt
from async_opd.maths import lag
from async_opd.roles.teacher.config import TeacherSamplingConfig


class Slots:
    """The right to have a group outstanding. Charged when a prompt is first handed out; returned
    exactly once: when the step that trained it has been published, or at its final drop. A
    re-issued prompt keeps its slot."""

    def __init__(self, count: int):
        self.count = count
        self._taken: set[int] = set()
        self._trained: set[int] = set()  # of them
        self._next = 0

    @property
    def free(self) -> int:
        """Slots not taken."""
        return self.count - len(self._taken)

    @property
    def outstanding(self) -> int:
        """Groups that hold a slot."""
        return len(self._taken)

    @property
    def untrained(self) -> int:
        """Groups that hold a slot and may come to be trained."""
        return len(self._taken) - len(self._trained)

    def take(self) -> int:
        """Charge a slot; returns its ticket, increasing in order of admission."""
        assert self.free > 0, "no slot is free"
        self._next += 1
        self._taken.add(self._next)
        return self._next

    def give_back(self, ticket: int) -> None:
        """Return the slot of `ticket`; a second return is a bug and raises KeyError."""
        self._taken.remove(ticket)

    def train(self, tickets: Iterable[int]) -> None:
        """Note that the groups of `tickets` are trained; they hold their slots until `publish`."""
        self._trained.update(tickets)

    def publish(self) -> None:
        """Return the slots of all that is trained."""
        self._taken -= self._trained
        self._trained.clear()


class TrajectoryQueue:
    """Hands out each group at most once, oldest first among the outstanding window that the slots
    allow.

    A group is over age when no token of it may be trained on under the live version (policy "mask")
    or when any may not (policy "drop"). One that the teacher answered never ages, for no version
    sampled it; it is late once the next step trains no more of them. Over-age and late groups never
    leave through `take`; `on_drop` gets their slots and prompts with the cause. The teacher answers
    sooner than the student is scored, so no step takes more than the share of its groups while
    others are to come.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_lag_steps: int,
        stale: Literal["mask", "drop"],
        on_drop: Callable[[int, Prompt, str], None],
        slots: Slots,
        wait_s: float,
        teacher: TeacherSamplingConfig | None = None,
        where: Callable[[], str] = lambda: "unknown",
    ):
        """`wait_s` bounds the time in which not one group more is ready, and no role has answered;
        `where()` says where the outstanding ones are."""
        self._per_step = groups_per_step
        self._bound, self._stale = max_lag_steps, stale
        self._on_drop, self._slots = on_drop, slots
        self._teacher = teacher
        self._most_of_teacher = teacher.most(groups_per_step) if teacher else 0
        self._ready: list[ScoredGroup] = []  # none over age or late at `_live`
        self._students = 0  # of them
        self._live = 0  # version of the last `take`
        self._enough = asyncio.Event()
        self._wait_s = wait_s
        self._where = where
        self.answered: Callable[[], float] = lambda: 0.0  # when a role last did
        self._last_came = 0.0  # when the last group came
        self.dropped: Counter[str] = Counter()  # trajectories, by cause

    def __len__(self) -> int:
        return len(self._ready)

    def put(self, group: ScoredGroup) -> None:
        """Add a scored group. Never blocks: the slots bound how many there can be."""
        if cause := self._past(group):
            self.drop(group.ticket, group.prompt, len(group.meta.spans), cause)
            return
        self._ready.append(group)
        self._students += not group.from_teacher
        self._last_came = asyncio.get_running_loop().time()
        if self._fills_a_step():
            self._enough.set()

    async def take(self, live: int) -> list[ScoredGroup]:
        """The next step's groups under live version `live`. Waits until enough of them are within
        the bound; producers unblock it with `put`. Each waiting group is looked at once a step,
        however many arrive. Raises TimedOut once the last came, and a role answered, too long
        ago; what is dropped did not come."""
        self._live = live
        self._expel()
        self._last_came = asyncio.get_running_loop().time()
        while not self._fills_a_step():
            self._enough.clear()
            await self._wait()
        self._ready.sort(key=lambda group: (group.since, group.ticket))
        # more of the teacher's where nothing else is to come
        most = max(self._most_of_teacher, self._per_step - self._students)
        beyond = {g.ticket for g in [g for g in self._ready if g.from_teacher][most:]}
        batch = [g for g in self._ready if g.ticket not in beyond][: self._per_step]
        leaving = {g.ticket for g in batch}
        self._ready = [g for g in self._ready if g.ticket not in leaving]
        self._students = sum(not g.from_teacher for g in self._ready)
        return sorted(batch, key=lambda group: group.ticket)

    def drop(self, ticket: int, prompt: Prompt, trajectories: int, cause: str) -> None:
        """Count a group that will not be trained, and hand its prompt to `on_drop`."""
        self.dropped[cause] += trajectories
        self._on_drop(ticket, prompt, cause)
        if self._fills_a_step():  # it may have been the last that was to come
            self._enough.set()

    async def _wait(self) -> None:
        """Until there is enough."""
        try:
            async with until(self._due):
                await self._enough.wait()
        except TimeoutError:
            dropped = ", ".join(f"{count} {cause}" for cause, count in self.dropped.items())
            raise TimedOut(
                f"queue: no group came in {self._wait_s:g} s, {len(self)} of {self._per_step} are"
                f" ready; outstanding: {self._where()}; dropped: {dropped or 'none'}"
            ) from None

    def _due(self) -> float:
        return max(self._last_came, self.answered()) + self._wait_s

    def _fills_a_step(self) -> bool:
        if len(self._ready) < self._per_step:
            return False
        nothing_else_is_to_come = self._slots.untrained == len(self._ready)
        return self._students + self._most_of_teacher >= self._per_step or nothing_else_is_to_come

    def _expel(self) -> None:
        waiting, self._ready = self._ready, []
        self._students = 0
        for group in waiting:
            self.put(group)

    def _past(self, group: ScoredGroup) -> str:
        """Why the next step cannot train the group; empty where it can."""
        if group.from_teacher:
            trained = self._teacher and self._teacher.is_trained_at(self._live + 1)
            return "" if trained else "teacher_late"
        return "stale" if self._over_age(group) else ""

    def _over_age(self, group: ScoredGroup) -> bool:
        if self._stale == "drop":
            return not lag.fresh(group.meta.oldest, self._live, self._bound)
        newest = max(group.meta.spans[sample][-1].version for sample in group.samples)
        return not lag.fresh(newest, self._live, self._bound)
