"""Bounded waits, what ends a run, and why it ended."""

import asyncio
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from async_opd.errors import AsyncOpdError, TimedOut
from async_opd.process_wide import sigterm_as_before

T = TypeVar("T")


async def bounded(awaitable: Awaitable[T], seconds: float, who: str) -> T:
    """Await at most `seconds`; raises TimedOut naming who was waited for and how long."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimedOut(f"{who}: no answer in {seconds:g} s") from None


def first_cause(error: BaseException) -> BaseException:
    """The named error inside (nested) exception groups: what ended the run, rather than what it
    dragged along."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [first_cause(e) for e in error.exceptions]
    return next((e for e in causes if isinstance(e, AsyncOpdError)), causes[0])


@contextmanager
def interrupted_by_signal(task: asyncio.Task) -> Iterator[None]:
    """Meanwhile SIGTERM, from `async-opd stop`, Slurm or Kubernetes, is to the main `task` as
    Ctrl-C is: the first cancels it and the second ends at once. So also where Ctrl-C is ignored, as
    a script's background jobs do."""

    def handle(number: int, frame: FrameType | None) -> None:
        if callable(on_ctrl_c := signal.getsignal(signal.SIGINT)):
            on_ctrl_c(number, frame)
        elif task.cancelling():
            raise KeyboardInterrupt
        else:
            task.get_loop().call_soon_threadsafe(task.cancel)

    with sigterm_as_before():
        signal.signal(signal.SIGTERM, handle)
        yield
