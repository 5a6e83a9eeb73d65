"""SIGTERM as Ctrl-C, for as long as a run works."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from async_opd.core.process_wide import sigterm_as_before


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
