"""SIGTERM as Ctrl-C, for as long as a run works."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from async_opd.core.process_wide import sigterm_as_before


@contextmanager
def interrupted_by_signal() -> Iterator[asyncio.Task]:
    """Treat SIGTERM, from `async-opd stop`, Slurm or Kubernetes, meanwhile as Ctrl-C: the first
    cancels the main task, which calls this, and the second ends at once. So also where Ctrl-C is
    ignored, as a script's background jobs do."""
    task = asyncio.current_task()
    assert task, "outside of a task"

    def handle(number: int, frame: FrameType | None) -> None:
        if callable(on_ctrl_c := signal.getsignal(signal.SIGINT)):
            on_ctrl_c(number, frame)
        elif task.cancelling():
            raise KeyboardInterrupt
        else:
            task.get_loop().call_soon_threadsafe(task.cancel)

    with sigterm_as_before():
        signal.signal(signal.SIGTERM, handle)
        yield task
