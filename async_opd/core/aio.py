"""What asyncio lacks: bounded waits, why a group of tasks ended, errors that nobody awaits."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from async_opd.core.errors import AsyncOpdError, TimedOut

T = TypeVar("T")
F = TypeVar("F", bound="asyncio.Future[Any]")


async def bounded(awaitable: Awaitable[T], seconds: float, who: str) -> T:
    """Await at most `seconds`; raises TimedOut naming who was waited for and how long."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimedOut(f"{who}: no answer in {seconds:g} s") from None


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


async def together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """The results of `calls`, made side by side. Where one fails, or the caller is cancelled, the
    others are cancelled and have ended before that is raised."""
    tasks = [retrieved(asyncio.ensure_future(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
