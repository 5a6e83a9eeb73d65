"""An event loop whose seconds pass at once."""

import asyncio
from collections.abc import Coroutine


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run, then jumps to the next timer; `time.monotonic` is
    not involved."""

    def __init__(self):
        super().__init__()
        self._now, look = 0.0, self._selector.select

        def jump(timeout: float | None):
            assert timeout is not None, "everybody waits, and no timer is left"
            self._now += timeout
            return look(0)

        self._selector.select = jump

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor, func, *args):
        """Threads take no time."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def virtual(main: Coroutine):
    """Run `main` in virtual time; returns its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
