"""What asyncio lacks: bounded waits, why a group of tasks ended, errors that nobody awaits.

Time in which the event loop stands still (a stopped process, a long callback) counts for no bound
here: what others have answered meanwhile has not been read yet.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from async_opd.core.errors import AsyncOpdError, TimedOut

T = TypeVar("T")
F = TypeVar("F", bound="asyncio.Future[Any]")
P = ParamSpec("P")

TICK_S = 0.125  # between two looks at how late the event loop is
LATE_S = 0.02  # lateness that is none
GRACE_S = 1.0  # to read what came while the event loop stood still
MAX_GRACES = 2  # of one wait: a loop may be late all the time


class Lag:
    """How long the running event loop has stood still, measured while somebody waits."""

    def __init__(self) -> None:
        self._sum_s = 0.0  # up to the last tick
        self._waits = 0
        self._due = 0.0  # the next tick
        self._tick: asyncio.TimerHandle | None = None

    @property
    def seconds(self) -> float:
        """In all so far, to which an overdue tick adds."""
        late = asyncio.get_running_loop().time() - self._due
        return self._sum_s + (late if self._waits and late > LATE_S else 0.0)

    def begin(self) -> None:
        """Measure until as many `end`."""
        if not self._waits:
            self._arm()
        self._waits += 1

    def end(self) -> None:
        """Measure no more, where nobody else waits."""
        self._waits -= 1
        if not self._waits and self._tick:
            self._tick.cancel()

    def _look(self) -> None:
        self._sum_s = self.seconds
        self._arm()

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + TICK_S
        self._tick = loop.call_at(self._due, self._look)


_lags: WeakKeyDictionary[asyncio.AbstractEventLoop, Lag] = WeakKeyDictionary()


class _Alarm:
    """Calls `ring` once, when the running loop's time is `due()` and what it stood still besides.
    `due()` may move. An alarm that comes late has the loop run on first."""

    def __init__(self, due: Callable[[], float], ring: Callable[[], None]):
        loop = asyncio.get_running_loop()
        self._loop, self._ring = loop, ring
        self._lag = _lags.setdefault(loop, Lag())
        self._lag.begin()
        before_s = self._lag.seconds
        self._moved = lambda: due() + self._lag.seconds - before_s
        self._graces = 0
        self._arm(due())

    def end(self) -> None:
        self._lag.end()
        self._timer.cancel()

    def _arm(self, when: float) -> None:
        self._when = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        due, now = self._moved(), self._loop.time()
        if now - self._when > LATE_S and self._graces < MAX_GRACES:
            self._graces += 1
            due = max(due, now + GRACE_S)
        if due > now:
            self._arm(due)
        else:
            self._ring()


@asynccontextmanager
async def until(
    due: Callable[[], float], at_expiry: Callable[[], None] = lambda: None
) -> AsyncGenerator[asyncio.Timeout]:
    """Raise TimeoutError inside once the running loop's time is `due()`, which may move. Calls
    `at_expiry` before anything else that is due."""

    def ring() -> None:
        at_expiry()
        timeout.reschedule(0.0)

    async with asyncio.timeout(None) as timeout:
        alarm = _Alarm(due, ring)
        try:
            yield timeout
        finally:
            alarm.end()


def within(seconds: float) -> AbstractAsyncContextManager[asyncio.Timeout]:
    """Raise TimeoutError inside after that time, as `asyncio.timeout` does."""
    end = asyncio.get_running_loop().time() + seconds
    return until(lambda: end)


async def bounded(awaitable: Awaitable[T], seconds: float | None, who: str) -> T:
    """Await at most `seconds`, None for ever; raises TimedOut naming who was waited for and how
    long."""
    if seconds is None:
        return await awaitable
    limit = None
    try:
        async with within(seconds) as limit:
            return await awaitable
    except TimeoutError:
        if limit is None or not limit.expired():
            raise
        raise TimedOut(f"{who}: no answer in {seconds:g} s") from None


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a thread makes of `work`. It has ended, too, where the caller is cancelled: nothing that
    it uses is free before."""
    working = retrieved(asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs)))
    try:
        return await asyncio.shield(working)
    finally:
        await asyncio.wait([working])


def first_cause(error: BaseException) -> BaseException:
    """The named error inside (nested) exception groups: what ended the run, rather than what it
    dragged along."""
    inside: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    if not inside:
        return error
    causes = [first_cause(e) for e in inside]
    return next((e for e in causes if isinstance(e, AsyncOpdError)), causes[0])


def retrieved(future: F) -> F:
    """`future`, whose error asyncio does not report as never retrieved where nobody awaits it any
    more: who did was cancelled, or has raised the error of another, and that is told."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


@asynccontextmanager
async def ended(*tasks: "asyncio.Future[Any]") -> AsyncGenerator[None]:
    """Behind it all of `tasks` have ended: those that have not are cancelled."""
    try:
        yield
    finally:
        if left := [retrieved(task) for task in tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left)


async def together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """The results of `calls`, made side by side. Where one fails, or the caller is cancelled, the
    others are cancelled and have ended before that is raised."""
    tasks = [retrieved(asyncio.ensure_future(call)) for call in calls]
    async with ended(*tasks):
        return await asyncio.gather(*tasks)
