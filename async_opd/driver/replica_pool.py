"""The members of one role: who gets the next call, how a lost one is noticed, and what takes its
place."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import ExitStack
from itertools import count, islice
from operator import attrgetter
from typing import Any, Generic, TypeVar, TypeVarTuple

from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, AsyncOpdError, TimedOut
from async_opd.core.events import EventSink
from async_opd.core.ports import Member
from async_opd.driver.replica import Replica
from async_opd.telemetry.spans import ActorTime, Of

MAX_FAILED_STARTS = 3  # in a row, of one member
RETRY_S = 1.0  # after the first of them, then twice as long each
LOAD = attrgetter("load")

M = TypeVar("M", bound=Member)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ReplicaPool(Generic[M]):
    """Sends each call to the member with the least in flight. A member that dies, or gives no sign
    of life, is retired: what it had is asked of the others, and a new one takes its place."""

    def __init__(
        self,
        name: str,
        ports: Sequence[M],
        *,
        spawn: Callable[[int], Awaitable[M]] | None = None,
        welcome: Callable[[Replica[M]], Awaitable[None]] | None = None,
        actor_time: Callable[[int], ActorTime] = lambda index: ActorTime(time.monotonic),
        idle: str = "starved",
        emit: EventSink = lambda what, who, why: None,
        lost_by: tuple[type[AsyncOpdError], ...] = (ActorLost, TimedOut),
    ):
        """`ports` are members 0, 1, … . `spawn(index)` starts a new one; without it, nobody is
        replaced. `welcome` makes it one of the others before it serves. `actor_time(index)` takes
        how the member spends its time, whose state without a call is `idle`. `lost_by`: errors of a
        call that retire the member."""
        self.name = name
        self._spawn = spawn
        self._welcome = welcome
        self._actor_time = actor_time
        self._idle = idle
        self._emit = emit
        self._lost_by = lost_by
        self._serving: dict[int, Replica[M]] = {}  # in order
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._free = asyncio.Event()  # somebody serves
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._wanted = set(range(len(ports)))  # members that there should be
        self._last_loss = ""
        self.lost = 0  # members so far
        self.answered = 0.0  # when a member last did
        for index, port in enumerate(ports):
            self._serve(self._replica(index, port))

    @property
    def size(self) -> int:
        """Members there should be."""
        return len(self._wanted)

    @property
    def can_grow(self) -> bool:
        """Whether it knows how to start a member."""
        return self._spawn is not None

    @property
    def serving(self) -> list[Replica[M]]:
        """The members that serve, in order."""
        return list(self._serving.values())

    @property
    def out(self) -> int:
        """Calls of all members without an answer yet."""
        return sum(replica.out for replica in self._serving.values())

    def start(self, tasks: asyncio.TaskGroup, *, every_s: float, stall_s: float) -> None:
        """From now on look at each member every `every_s` seconds; one without an answer for
        `stall_s` is lost."""
        self._tasks, self._look = tasks, (every_s, stall_s)
        for replica in self.serving:
            self._watch(replica)
        self._fill()

    def stop(self) -> None:
        """Watch and replace no more."""
        self._tasks = None
        for task in (*self._watches.values(), *self._coming.values()):
            task.cancel()

    def idles(self, state: str) -> None:
        """From now on `state` is what members are in without a call."""
        if state != self._idle:
            self._idle = state
            for replica in self.serving:
                replica.idles(state)

    def resize(self, size: int) -> None:
        """Bring the pool to `size` members: start new ones, or retire the last, which hand back
        what they have."""
        self._emit("scaled", self.name, f"{self.size} -> {size}")
        members = sorted(self._wanted, key=lambda index: (index not in self._serving, index))
        for index in members[size:]:
            self._wanted.discard(index)
            if index in self._serving:
                self.retire(self._serving[index], f"the pool shrinks to {size}")
        free = (index for index in count() if index not in self._wanted)
        self._wanted |= set(islice(free, max(size - len(members), 0)))
        self._fill()

    async def ask(
        self,
        method: Callable[[M, *Ts], Coroutine[Any, Any, T]],
        *args: *Ts,
        of: Of = "",
        load: int = 1,
        asked: set[int] | None = None,
        lost: Callable[[str], None] = lambda why: None,
    ) -> T:
        """Call `method` of the member with the least in flight, while it counts for `load`. Waits
        while nobody serves.

        Another is asked again when the member is lost meanwhile, after `lost` was told why. Any
        other named error is the caller's. The number of who is asked is added to `asked`, and
        members in there are asked last. Raises ActorLost when nobody is left and none can come."""
        while True:
            replica = await self._least(asked or ())
            if asked is not None:
                asked.add(replica.index)
            replica.load += load
            try:
                answer = await replica.call(method, *args, of=of)
                self.answered = asyncio.get_running_loop().time()
                return answer
            except self._lost_by as e:
                self.retire(replica, str(e))
                lost(replica.lost)
            finally:
                replica.load -= load

    def retire(self, replica: Replica[M], why: str) -> None:
        """Give `replica` up: nothing more is asked of it, and another takes its place. May be
        called again."""
        if replica.lost:
            return
        replica.leave(why)
        self.lost += 1
        self._last_loss = why
        self._emit("lost", replica.name, why)
        if self._serving.get(replica.index) is replica:
            del self._serving[replica.index]
            if not self._serving:
                self._emit("none left", self.name, "what needs one waits")
        self._fill()

    def refuse_if_empty(self) -> None:
        """Raises ActorLost when nobody is left and none can come."""
        if not self._serving and not self._coming:
            raise ActorLost(self._last_loss)

    async def _least(self, asked: Collection[int]) -> Replica[M]:
        while not self._serving:
            self.refuse_if_empty()
            self._free.clear()
            await self._free.wait()
        members = self._serving.values()
        able = [each for each in members if each.index not in asked] if asked else members
        return min(able or members, key=LOAD)  # the first of several

    def _replica(self, index: int, port: M) -> Replica[M]:
        name, actor_time = f"{self.name} {index}", self._actor_time(index)
        return Replica(name, index, port, actor_time, idle=self._idle, kill=port.kill)

    def _serve(self, replica: Replica[M]) -> None:
        self._serving = dict(sorted({**self._serving, replica.index: replica}.items()))
        self._free.set()
        if self._tasks:
            self._watch(replica)

    def _fill(self) -> None:
        """Start a member for each place that is empty, where that can be done."""
        if self._spawn and self._tasks:
            for index in self._wanted - self._serving.keys() - self._coming.keys():
                self._coming[index] = self._tasks.create_task(
                    self._start(index), name=f"start {self.name} {index}"
                )

    async def _start(self, index: int) -> None:
        """Waits for a new member and for its welcome; `_serve` unblocks those who wait for one."""
        replica, why = None, ""
        wait_s = RETRY_S
        try:
            for _ in range(MAX_FAILED_STARTS):
                try:
                    replica = await self._arrived(index)
                    break
                except ActorLost as e:
                    why = f"{MAX_FAILED_STARTS} starts in a row failed, the last: {e}"
                    self._emit("did not start", f"{self.name} {index}", str(e))
                await asyncio.sleep(wait_s)
                wait_s *= 2
        finally:
            del self._coming[index]
        if replica is None:
            self._wanted.discard(index)
            if not self._serving and not self._coming:
                raise ActorLost(f"{self.name} {index}: {why}")
            self._emit("given up", f"{self.name} {index}", why)
        elif index in self._wanted:
            self._serve(replica)
            self._emit("serves", replica.name, "")
        else:
            replica.leave("the pool shrank while it started")

    async def _arrived(self, index: int) -> Replica[M]:
        """A member that may serve. Raises ActorLost where it may not; what else its welcome raises
        is not its own."""
        assert self._spawn
        try:
            port = await self._spawn(index)
        except AsyncOpdError as e:
            raise ActorLost(f"{e}") from e
        replica = self._replica(index, port)
        with ExitStack() as unless:
            unless.callback(replica.leave, "it was not welcome")
            if self._welcome:
                await self._welcome(replica)
            unless.pop_all()
        return replica

    def _watch(self, replica: Replica[M]) -> None:
        assert self._tasks
        self._watches[replica.index] = self._tasks.create_task(
            self._look_at(replica), name=f"watch {replica.name}"
        )

    async def _look_at(self, replica: Replica[M]) -> None:
        """Looks until the member is lost: an engine can die inside an actor that lives, and a
        process can stop."""
        every_s, stall_s = self._look
        who = f"{replica.name}, sign of life"
        while not replica.lost:
            await asyncio.sleep(every_s)
            try:
                await bounded(replica.hold(replica.port.check_health()), stall_s, who)
            except AsyncOpdError as e:
                self.retire(replica, str(e))
