"""The members of one role: how a lost one is noticed, and what takes its place."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice

from async_opd.core.errors import ActorLost, AsyncOpdError, TimedOut
from async_opd.core.events import EventSink
from async_opd.driver.asked import Asked, M
from async_opd.driver.replica import Replica
from async_opd.telemetry.spans import ActorTime

MAX_FAILED_STARTS = 3  # in a row, of one member, while nobody else serves
RETRY_S = 1.0  # after the first of them, then twice as long each
MAX_RETRY_S = 300.0


@dataclass(frozen=True)
class Servers:
    """Somebody's servers, each asked by one member, which is known by its address."""

    urls: tuple[str, ...]
    patience_s: float  # for which they may all be away


class ReplicaPool(Asked[M]):
    """Who there should be of one role, who serves, and who is on the way. A member that dies, or
    gives no sign of life, is retired, and a new one takes its place."""

    def __init__(
        self,
        name: str,
        ports: Sequence[M | None],
        *,
        spawn: Callable[[int | str], Awaitable[M]] | None = None,
        welcome: Callable[[Replica[M]], Awaitable[None]] | None = None,
        actor_time: Callable[[str], ActorTime] = lambda name: ActorTime(time.monotonic),
        idle: str = "starved",
        emit: EventSink = lambda what, who, why: None,
        servers: Servers | None = None,
    ):
        """`ports` are members 0, 1, …, but for those that are still to come. `spawn(which)` starts
        the one of that number, or for the server at that address; without it, nobody is replaced.
        `welcome` makes it one of the others before it serves. `actor_time(name)` takes how the
        member spends its time, whose state without a call is `idle`. `servers`: those that
        members 0, 1, … ask."""
        super().__init__(name, emit)
        self._spawn = spawn
        self._welcome = welcome
        self._actor_time = actor_time
        self._idle = idle
        self._coming: dict[int, asyncio.Task[None]] = {}
        self._failing: dict[int, str] = {}  # of them: why MAX_FAILED_STARTS and more have failed
        self._tasks: asyncio.TaskGroup | None = None
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._wanted = set(range(len(ports)))  # members that there should be
        self._urls = [*servers.urls] if servers else []  # by the members' numbers
        self._patience_s = servers.patience_s if servers else 0.0
        self._last_loss = ""
        self._leaving: dict[Replica[M], str] = {}  # at the end of the update that runs, and why
        self._updated_at = -math.inf  # the end of the last update; inf: one runs
        self.lost = 0  # members so far
        for index, port in enumerate(ports):
            if port is not None:
                self._serve(self._replica(index, port))

    @property
    def size(self) -> int:
        """Members there should be."""
        return len(self._wanted)

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers that its members should ask; none where they ask none."""
        return [url for index, url in enumerate(self._urls) if index in self._wanted]

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

    def start(self, tasks: asyncio.TaskGroup, *, every_s: float) -> None:
        """From now on look at each member every `every_s` seconds; one that does not answer, within
        the bound that its port has, is lost."""
        self._tasks, self._every_s = tasks, every_s
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
        what they have; at the end of an update where one runs."""
        self._emit("scaled", self.name, f"{self.size} -> {size}")
        members = sorted(self._wanted, key=lambda index: (index not in self._serving, index))
        self._wanted -= set(members[size:])
        free = (index for index in count() if index not in self._wanted)
        self._wanted |= set(islice(free, max(size - len(members), 0)))
        self._shrink()
        self._fill()

    def ask_servers(self, urls: Sequence[str]) -> None:
        """From now on have a member for each of the servers at `urls`: start those that are new;
        what the others have is asked of those that stay."""
        self._emit("scaled", self.name, f"{', '.join(self.urls)} -> {', '.join(urls)}")
        self._urls += [url for url in urls if url not in self._urls]
        self._wanted = {self._urls.index(url) for url in urls}
        self._shrink()
        self._fill()

    @contextmanager
    def updating(self) -> Generator[None]:
        """Weights travel to the members, which ends well for all of them or for none. None of them
        that lives is given up meanwhile: who is to leave leaves at the end, and one that is silent
        is judged by the bounds of the update's own calls. One that is dead is retired at once."""
        self._updated_at = math.inf
        try:
            yield
        finally:
            self._updated_at = asyncio.get_running_loop().time()
            for replica, why in self._leaving.items():
                self.retire(replica, why, blameless=True)
            self._leaving.clear()
            self._shrink()

    def dismiss(self, replica: Replica[M], why: str) -> None:
        """See Asked."""
        if self._updated_at == math.inf:
            self._leaving.setdefault(replica, why)
        else:
            self.retire(replica, why, blameless=True)

    def retire(self, replica: Replica[M], why: str, *, blameless: bool = False) -> None:
        """See Asked."""
        if replica.lost:
            return
        replica.standing.blameless = blameless
        replica.leave(why)
        self.lost += 1
        self._last_loss = why
        self._emit("lost", replica.name, why)
        if self._serving.get(replica.index) is replica:
            del self._serving[replica.index]
            self._changed.set()
            if not self._serving:
                self._emit("none left", self.name, "what needs one waits")
        self._fill()

    def refuse_if_empty(self) -> None:
        """See Asked."""
        if not self._serving and not self._coming:
            raise ActorLost(self._last_loss)

    def _shrink(self) -> None:
        """Dismiss those that serve and are not wanted, unless an update runs."""
        if self._updated_at < math.inf:
            for replica in self.serving:
                if replica.index not in self._wanted:
                    gone = "its server is dropped" if self._urls else ""
                    self.dismiss(replica, gone or f"the pool shrinks to {self.size}")

    def _which(self, index: int) -> int | str:
        """What the member of that number is known by."""
        return self._urls[index] if self._urls else index

    def _replica(self, index: int, port: M) -> Replica[M]:
        name = f"{self.name} {self._which(index)}"
        time = self._actor_time(name)
        return Replica(name, index, port, time, idle=self._idle, kill=port.kill)

    def _serve(self, replica: Replica[M]) -> None:
        self._serving = dict(sorted({**self._serving, replica.index: replica}.items()))
        self._changed.set()
        if self._tasks:
            self._watch(replica)

    def _fill(self) -> None:
        """Start a member for each place that is empty, where that can be done."""
        if self._spawn and self._tasks:
            for index in self._wanted - self._serving.keys() - self._coming.keys():
                self._coming[index] = self._tasks.create_task(
                    self._start(index), name=f"start {self.name} {self._which(index)}"
                )

    async def _start(self, index: int) -> None:
        """Waits for a new member and for its welcome, as often as it takes while others serve;
        `_serve` unblocks those who wait for one. Raises ActorLost once nobody serves and whoever
        was to come has failed MAX_FAILED_STARTS times; a server may be away for longer."""
        try:
            replica = await self._at_last(index)
        finally:
            del self._coming[index]
            self._failing.pop(index, None)
        if replica and index in self._wanted:
            self._serve(replica)
            self._emit("serves", replica.name, "")
        elif replica:
            replica.leave("the pool shrank while it started")

    async def _at_last(self, index: int) -> Replica[M] | None:
        """A member that may serve; None once it is not wanted any more."""
        name, announced = f"{self.name} {self._which(index)}", ""
        until = asyncio.get_running_loop().time() + self._patience_s
        for failed in count(1):
            try:
                return await self._arrived(index)
            except ActorLost as e:
                why = f"{e}"
            if why != announced:
                announced = why
                self._emit("did not start", name, f"{why}; it is tried again, ever more rarely")
            if failed >= MAX_FAILED_STARTS and asyncio.get_running_loop().time() >= until:
                self._failing[index] = why
                self._refuse_if_none_comes(name, failed)
            await asyncio.sleep(min(RETRY_S * 2 ** min(failed - 1, 30), MAX_RETRY_S))
            if index not in self._wanted:
                break
        return None

    def _refuse_if_none_comes(self, name: str, failed: int) -> None:
        if not self._serving and self._coming.keys() == self._failing.keys():
            why = list(self._failing.values())[-1]
            raise ActorLost(f"{name}: {failed} starts in a row failed, the last: {why}")

    async def _arrived(self, index: int) -> Replica[M]:
        """A member that may serve. Raises ActorLost where it may not; what else its welcome raises
        is not its own."""
        assert self._spawn
        try:
            port = await self._spawn(self._which(index))
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
        process can stop. What is silent while it takes weights is looked at again."""
        clock = asyncio.get_running_loop().time
        while not replica.lost:
            await asyncio.sleep(self._every_s)
            began = clock()
            try:
                await replica.hold(replica.port.check_health())
            except TimedOut as e:
                if self._updated_at < began:
                    self.retire(replica, str(e))
            except AsyncOpdError as e:
                self.retire(replica, str(e))
