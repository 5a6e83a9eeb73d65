"""Admission slots and the replay-free queue: between them the lag bound holds exactly."""

import asyncio
from collections import Counter
from collections.abc import Callable

from async_opd.core.errors import TimedOut
from async_opd.core.ports import Ready
from async_opd.core.wire import Prompt
from async_opd.driver.teacher_sampling import Taught
from async_opd.maths import lag


class Slots:
    """The right to have a group outstanding. Charged when a prompt is first handed out; returned
    exactly once: when the step that trained it has been published, or at its final drop. A
    re-issued prompt keeps its slot."""

    def __init__(self, count: int):
        self.count = count
        self._held: set[int] = set()
        self._next = 0

    @property
    def free(self) -> int:
        """Slots not held."""
        return self.count - len(self._held)

    def take(self) -> int:
        """Charge a slot; returns its ticket, increasing in order of admission."""
        assert self.free > 0, "no slot is free"
        self._next += 1
        self._held.add(self._next)
        return self._next

    def give_back(self, ticket: int) -> None:
        """Return the slot of `ticket`; a second return is a bug and raises KeyError."""
        self._held.remove(ticket)


class TrajectoryQueue:
    """Hands out each group at most once, oldest first among the outstanding window that the slots
    allow.

    A group is over age when no token of it may be trained on under the live version (policy "mask")
    or when any may not (policy "drop"). A taught one never ages, for no version sampled it; it is
    late once the next step teaches no more. Over-age and late groups never leave through `take`;
    `on_drop` gets their slots and prompts with the cause. The teacher answers sooner than the
    student is scored, so no step takes more than the share of taught ones while others are to come.
    """

    def __init__(
        self,
        *,
        groups_per_step: int,
        max_lag_steps: int,
        stale: str,
        on_drop: Callable[[int, Prompt, str], None],
        wait_s: float,
        taught: Taught | None = None,
        outstanding: Callable[[], str] = lambda: "unknown",
    ):
        """`wait_s` bounds the time in which not one group more is ready; `outstanding()` says where
        the others are."""
        self._per_step = groups_per_step
        self._bound = max_lag_steps
        self._stale = stale
        self._on_drop = on_drop
        self._taught, self._most_taught = taught, taught.most(groups_per_step) if taught else 0
        self._ready: list[Ready] = []  # none over age or late at `_live`
        self._students = 0  # of them
        self._live = 0  # version of the last `take`
        self._enough = asyncio.Event()
        # when the last group came
        self._wait_s = wait_s
        self._outstanding = outstanding
        self._heard = 0.0
        self.dropped: Counter[str] = Counter()  # trajectories, by cause

    def __len__(self) -> int:
        return len(self._ready)

    def put(self, ready: Ready) -> None:
        """Add a scored group. Never blocks: the slots bound how many there can be."""
        if cause := self._past(ready):
            self.drop(ready.ticket, ready.prompt, len(ready.meta.spans), cause)
            return
        self._ready.append(ready)
        self._students += not ready.prompt.taught
        self._heard = asyncio.get_running_loop().time()
        if self._fills_a_step():
            self._enough.set()

    async def take(self, live: int) -> list[Ready]:
        """The next step's groups under live version `live`. Waits until enough of them are within
        the bound; producers unblock it with `put`. Each waiting group is looked at once a step,
        however many arrive. Raises TimedOut once the last came too long ago; what is dropped did
        not come."""
        self._live = live
        self._expel()
        self._heard = asyncio.get_running_loop().time()
        while not self._fills_a_step():
            self._enough.clear()
            await self._wait()
        self._ready.sort(key=lambda r: (r.since, r.ticket))
        # more where nothing else is to come
        most_taught = max(self._most_taught, self._per_step - self._students)
        taught = [r.ticket for r in self._ready if r.prompt.taught][most_taught:]
        batch = [r for r in self._ready if r.ticket not in taught][: self._per_step]
        self._leave({r.ticket for r in batch})
        return sorted(batch, key=lambda r: r.ticket)

    def drop(self, ticket: int, prompt: Prompt, trajectories: int, cause: str) -> None:
        """Count a group that will not be trained, and hand its prompt to `on_drop`."""
        self.dropped[cause] += trajectories
        self._on_drop(ticket, prompt, cause)
        if self._fills_a_step():  # it may have been the last that was to come
            self._enough.set()

    async def _wait(self) -> None:
        """Until there is enough, or it is time to look again."""
        try:
            async with asyncio.timeout_at(self._heard + self._wait_s) as limit:
                await self._enough.wait()
        except TimeoutError:
            if limit.when() < self._heard + self._wait_s:  # a group came meanwhile
                return
            dropped = (
                ", ".join(f"{count} {cause}" for cause, count in self.dropped.items()) or "none"
            )
            raise TimedOut(
                f"queue: no group came in {self._wait_s:g} s, {len(self)} of {self._per_step} are"
                f" ready; outstanding: {self._outstanding()}; dropped: {dropped}"
            ) from None

    def _fills_a_step(self) -> bool:
        if len(self._ready) < self._per_step:
            return False
        return (
            self._students + self._most_taught >= self._per_step
            or self._taught.outstanding() == len(self._ready)
        )

    def _leave(self, tickets: set[int]) -> None:
        self._ready = [r for r in self._ready if r.ticket not in tickets]
        self._students = sum(not r.prompt.taught for r in self._ready)

    def _expel(self) -> None:
        waiting = self._ready
        self._ready = []
        self._students = 0
        for ready in waiting:
            self.put(ready)

    def _past(self, ready: Ready) -> str:
        """Why the next step cannot train the group; empty where it can."""
        if ready.prompt.taught:
            return "" if self._taught.teaches(self._live + 1) else "teacher_late"
        return "stale" if self._over_age(ready) else ""

    def _over_age(self, ready: Ready) -> bool:
        if self._stale == "drop":
            return not lag.fresh(ready.meta.oldest, self._live, self._bound)
        newest = max(ready.meta.spans[s][-1].version for s in ready.samples)
        return not lag.fresh(newest, self._live, self._bound)
