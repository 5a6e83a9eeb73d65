"""One actor as the driver sees it: what it has out, the state that follows, and how it ends."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, TypeVarTuple

from async_opd.core.errors import ActorLost
from async_opd.driver.standing import Standing
from async_opd.telemetry.spans import CUT_OFF, ActorTime, Of

P = TypeVar("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Replica(Generic[P]):
    """Counts the calls that an actor has out, enters the state that follows from them, and records
    each as a span. It is always in one of these states:

    - busy: a call is out
    - starved: none is, for lack of input. Generator: no prompt is left to hand out; one that holds
      the teacher, teacher, verifier: no group has come; learner: the queue holds less than a step
    - blocked: held back from behind. Generator: it has no request, prompts are left, and every slot
      is held by a group that is elsewhere; learner: a checkpoint or self-teachers have it wait
    - syncing: weights travel. Generator and learner: from the first call of an update to the last;
      self-teacher: while it takes the student's weights
    - down: from when it is given up until another takes its place

    What an actor does inside a call (a rank that waits for another, a request that waits for a
    place in the engine) the driver cannot see.
    """

    def __init__(
        self,
        name: str,
        index: int,
        port: P,
        time: ActorTime,
        *,
        idle: str = "starved",
        kill: Callable[[], None] = lambda: None,
    ):
        """`idle` is the state of an actor that has no call; `kill` ends it."""
        self.name = name
        self.index = index
        self.port = port
        self.lost = ""  # why it is gone for good; empty while it lives
        self.load = 0  # what it has out, weighed by those who ask
        self.out = 0  # calls without an answer yet
        self.sent = 0  # calls so far that are on their way or answered
        self.standing = Standing()
        self._time = time
        self._idle = idle
        self._held = ""  # the state that it is held in, whatever it is asked
        self._kill = kill
        self._calls: set[asyncio.Future[Any]] = set()
        self._enter()

    async def call(
        self,
        method: Callable[[P, *Ts], Coroutine[Any, Any, T]],
        *args: *Ts,
        of: Of = "",
    ) -> T:
        """Await `method`, named as the port declares it, of the actor, `of` a prompt, a version or
        several. Raises ActorLost as soon as the actor is given up: a late answer meets nobody."""
        self.out += 1
        start, cut_off = self._enter(), CUT_OFF
        try:
            answer = await self.hold(self._send(method.__name__, *args))
            cut_off = ""
            return answer
        finally:
            self.out -= 1
            self._time.called(f"{method.__name__}{cut_off}", of, start, self._enter())

    async def _send(self, method: str, *args: Any) -> Any:
        """Make the call; from the count to its way out nothing else runs."""
        self.sent += 1
        return await getattr(self.port, method)(*args)

    async def hold(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call that counts for nothing, such as a look at its health. Raises ActorLost as
        `call` does."""
        if self.lost:
            call.close()
            raise ActorLost(self.lost)
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if self.lost and not (me and me.cancelling()):
                raise ActorLost(self.lost) from None
            raise
        finally:
            self._calls.discard(task)

    @contextmanager
    def held(self, state: str) -> Generator[None]:
        """The actor is in `state` meanwhile, whatever is asked of it, or until `release`."""
        before, self._held = self._held, state
        self._enter()
        try:
            yield
        finally:
            self._held = before
            self._enter()

    def release(self) -> None:
        """The actor's state is again what follows from its calls."""
        self._held = ""
        self._enter()

    def idles(self, state: str) -> None:
        """From now on `state` is what the actor is in without a call."""
        self._idle = state
        self._enter()

    def leave(self, why: str) -> None:
        """End the actor and every call that it has. May be called again."""
        if self.lost:
            return
        self.lost = why or "lost"
        self._time.enter("down")
        self._kill()
        for task in self._calls:
            task.cancel()

    def _enter(self) -> float:
        """Enter the state that follows; returns when that is."""
        if self.lost:  # the time may be another's by now
            return self._time.now()
        return self._time.enter(self._held or ("busy" if self.out else self._idle))
