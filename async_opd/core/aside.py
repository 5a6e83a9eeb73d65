"""Work that blocks, such as a disk's, on threads beside the event loop. One that hangs for ever
keeps neither the loop nor the end of the process waiting, as a thread of an ordinary pool does."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from async_opd.core.aio import bounded, retrieved

T = TypeVar("T")


class DaemonThread(Executor):
    """One thread, which runs what it is given in that order. A process may end without it."""

    def __init__(self, name: str):
        """`name` is what a dump of all threads calls it."""
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` behind what came before; one that is cancelled by then is left out."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as e:  # it is raised where the result is asked for
                future.set_exception(e)
            else:
                future.set_result(result)

        self._calls.put(call)
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """End the thread behind what it was given; nobody waits for it."""
        self._calls.put(None)

    def _run(self) -> None:
        while call := self._calls.get():
            call()


async def aside(
    seconds: float,
    what: str,
    call: Callable[..., T],
    *args: Any,
    thread: DaemonThread | None = None,
) -> T:
    """The result of `call`, which blocks, in a `thread`, by default one of its own. Raises TimedOut
    naming `what` after so many seconds; the call is then left behind, or left out where it has not
    begun."""
    used = thread or DaemonThread(what)
    try:
        working = asyncio.get_running_loop().run_in_executor(used, call, *args)
        return await bounded(retrieved(working), seconds, what)
    finally:
        if thread is None:
            used.shutdown()
