"""The members of one role: who gets the next call, how a lost one is noticed, and what takes its
place."""

import asyncio
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import ExitStack
from itertools import count, islice
from typing import Any, Generic, Protocol, TypeVar

from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, AsyncOpdError, TimedOut
from async_opd.core.events import Tell

MAX_FAILED_STARTS = 3  # in a row, of one seat
RETRY_S = 1.0  # after the first of them, then twice as long each


class Member(Protocol):
    """What a pool needs of a port."""

    async def check_health(self) -> None: ...
    def kill(self) -> None: ...


P = TypeVar("P", bound=Member)
T = TypeVar("T")


class Seat(Generic[P]):
    """One place in a pool and the member that holds it. `lost` says why that is gone for good;
    empty while it lives."""

    def __init__(self, name: str, index: int, port: P):
        self.name = name
        self.index = index
        self.port = port
        self.lost = ""
        self._calls: set[asyncio.Future] = set()

    async def hold(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call of the member. Raises ActorLost as soon as the member is retired: a late
        answer meets nobody."""
        if self.lost:
            call.close()
            raise ActorLost(self.lost)
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if self.lost and not asyncio.current_task().cancelling():
                raise ActorLost(self.lost) from None
            raise
        finally:
            self._calls.discard(task)

    def leave(self, why: str) -> None:
        """End the member and every call that it has. May be called again."""
        if self.lost:
            return
        self.lost = why or "lost"
        self.port.kill()
        for task in self._calls:
            task.cancel()


class Loads:
    """What each seat has in flight, kept in order: a choice among hundreds must not look at each of
    them."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}
        self._order: list[tuple[int, int]] = []

    def join(self, at: int) -> None:
        self._of[at] = 0
        insort(self._order, (0, at))

    def leave(self, at: int) -> None:
        del self._order[bisect_left(self._order, (self._of.pop(at), at))]

    def least(self, avoid: Collection[int] = ()) -> int:
        """The seat with the least in flight, the first of several; one to `avoid` only where there
        is no other."""
        return next((at for _, at in self._order if at not in avoid), self._order[0][1])

    def add(self, at: int, load: int) -> None:
        """`load` more, or less, is in flight at seat `at`."""
        del self._order[bisect_left(self._order, (self._of[at], at))]
        self._of[at] += load
        insort(self._order, (self._of[at], at))


class Pool(Generic[P]):
    """Sends each call to the member with the least in flight. A member that dies, or gives no sign
    of life, is retired: what it had is asked of the others, and its seat goes to a new one."""

    def __init__(
        self,
        name: str,
        ports: Sequence[P],
        *,
        spawn: Callable[[int], Awaitable[P]] | None = None,
        welcome: Callable[[Seat[P]], Awaitable[None]] | None = None,
        wrap: Callable[[int, P], P] = lambda index, port: port,
        tell: Tell = lambda what, who, why: None,
        lost_by: tuple[type[AsyncOpdError], ...] = (ActorLost, TimedOut),
    ):
        """`ports` hold seats 0, 1, … . `spawn(seat)` starts a new member; without it, nobody is
        replaced. `welcome` makes it one of the others before it serves. `wrap(seat, port)` sees
        every member first. `lost_by`: errors of a call that retire the member."""
        self.name = name
        self._spawn = spawn
        self._welcome = welcome
        self._wrap = wrap
        self._tell = tell
        self._lost_by = lost_by
        self._seats: dict[int, Seat[P]] = {}  # those that serve
        self._coming: dict[int, asyncio.Task] = {}
        self._loads, self._free = Loads(), asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[int, asyncio.Task] = {}
        self._wanted = set(range(len(ports)))  # seats that should be taken
        self.lost = 0  # members so far
        for index, port in enumerate(ports):
            self._serve(Seat(f"{name} {index}", index, wrap(index, port)))

    @property
    def size(self) -> int:
        """Members there should be."""
        return len(self._wanted)

    @property
    def can_grow(self) -> bool:
        """Whether it knows how to start a member."""
        return self._spawn is not None

    @property
    def serving(self) -> list[Seat[P]]:
        """The seats that serve, in order."""
        return [self._seats[index] for index in sorted(self._seats)]

    def start(self, tasks: asyncio.TaskGroup, *, every_s: float, stall_s: float) -> None:
        """From now on look at each member every `every_s` seconds; one without an answer for
        `stall_s` is lost."""
        self._tasks, self._look = tasks, (every_s, stall_s)
        for seat in self.serving:
            self._watch(seat)
        self._fill()

    def stop(self) -> None:
        """Watch and replace no more."""
        self._tasks = None
        for task in (*self._watches.values(), *self._coming.values()):
            task.cancel()

    def resize(self, size: int) -> None:
        """Bring the pool to `size` members: start new ones, or retire the last, which hand back
        what they have."""
        self._tell("scaled", self.name, f"{self.size} -> {size}")
        seats = sorted(self._wanted, key=lambda index: (index not in self._seats, index))
        for index in seats[size:]:
            self._wanted.discard(index)
            if index in self._seats:
                self.retire(self._seats[index], f"the pool shrinks to {size}")
        free = (index for index in count() if index not in self._wanted)
        self._wanted |= set(islice(free, max(size - len(seats), 0)))
        self._fill()

    async def ask(
        self,
        call: Callable[[P], Coroutine[Any, Any, T]],
        *,
        load: int = 1,
        failed: set[int] | None = None,
        lost: Callable[[str], None] = lambda why: None,
    ) -> T:
        """`call` of the member with the least in flight, while it counts for `load`. Waits while
        nobody serves.

        Asked again of another when the member is lost meanwhile, after `lost` was told why. Any
        other named error is the caller's; its seat is added to `failed`, and seats in there are
        asked last. Raises ActorLost when nobody is left and none can come."""
        while True:
            seat = await self._least(failed or ())
            self._loads.add(seat.index, load)
            try:
                return await seat.hold(call(seat.port))
            except self._lost_by as e:
                self.retire(seat, str(e))
                lost(seat.lost)
            except AsyncOpdError:
                if failed is not None:
                    failed.add(seat.index)
                raise
            finally:
                if self._seats.get(seat.index) is seat:
                    self._loads.add(seat.index, -load)

    def retire(self, seat: Seat[P], why: str) -> None:
        """`seat`'s member is gone: nothing more is asked of it, and another takes its place. May be
        called again."""
        if seat.lost:
            return
        seat.leave(why)
        self.lost += 1
        self._last_loss = why
        self._tell("lost", seat.name, why)
        if self._seats.get(seat.index) is seat:
            del self._seats[seat.index]
            self._loads.leave(seat.index)
            if not self._seats:
                self._tell("none left", self.name, "what needs one waits")
        self._fill()

    def refuse_if_empty(self) -> None:
        """Raises ActorLost when nobody is left and none can come."""
        if not self._seats and not self._coming:
            raise ActorLost(self._last_loss)

    async def _least(self, failed: Collection[int]) -> Seat[P]:
        while not self._seats:
            self.refuse_if_empty()
            self._free.clear()
            await self._free.wait()
        return self._seats[self._loads.least(failed)]

    def _serve(self, seat: Seat[P]) -> None:
        self._seats[seat.index] = seat
        self._loads.join(seat.index)
        self._free.set()
        if self._tasks:
            self._watch(seat)

    def _fill(self) -> None:
        """Start a member for each seat that is empty, where that can be done."""
        if self._spawn and self._tasks:
            for index in self._wanted - self._seats.keys() - self._coming.keys():
                self._coming[index] = self._tasks.create_task(
                    self._start(index), name=f"start {self.name} {index}"
                )

    async def _start(self, index: int) -> None:
        """Waits for a new member and for its welcome; `_serve` unblocks those who wait for one."""
        seat, wait_s = None, RETRY_S
        try:
            for _ in range(MAX_FAILED_STARTS):
                try:
                    seat = await self._arrived(index)
                    break
                except ActorLost as e:
                    error = f"{MAX_FAILED_STARTS} starts in a row failed, the last: {e}"
                    self._tell("did not start", f"{self.name} {index}", str(e))
                await asyncio.sleep(wait_s)
                wait_s *= 2
        finally:
            del self._coming[index]
        if seat is None:
            self._wanted.discard(index)
            if not self._seats and not self._coming:
                raise ActorLost(f"{self.name} {index}: {error}")
            self._tell("given up", f"{self.name} {index}", error)
        elif index in self._wanted:
            self._serve(seat)
            self._tell("serves", seat.name, "")
        else:
            seat.leave("the pool shrank while it started")

    async def _arrived(self, index: int) -> Seat[P]:
        """A member that may serve. Raises ActorLost where it may not; what else its welcome raises
        is not its own."""
        try:
            port = await self._spawn(index)
        except AsyncOpdError as e:
            raise ActorLost(f"{e}") from e
        seat = Seat(f"{self.name} {index}", index, self._wrap(index, port))
        with ExitStack() as unless:
            unless.callback(seat.leave, "it was not welcome")
            if self._welcome:
                await self._welcome(seat)
            unless.pop_all()
        return seat

    def _watch(self, seat: Seat[P]) -> None:
        self._watches[seat.index] = self._tasks.create_task(
            self._look_at(seat), name=f"watch {seat.name}"
        )

    async def _look_at(self, seat: Seat[P]) -> None:
        """Looks until the member is lost: an engine can die inside an actor that lives, and a
        process can stop."""
        every_s, stall_s = self._look
        while not seat.lost:
            await asyncio.sleep(every_s)
            try:
                await bounded(
                    seat.hold(seat.port.check_health()), stall_s, f"{seat.name}, sign of life"
                )
            except AsyncOpdError as e:
                self.retire(seat, str(e))
