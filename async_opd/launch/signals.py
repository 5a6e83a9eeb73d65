"""SIGTERM and SIGHUP as Ctrl-C: a run ends with a checkpoint, any other command at once."""

import asyncio
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from async_opd.core.process_wide import signals_as_before

ENDING = (signal.SIGTERM, signal.SIGHUP)  # as Ctrl-C is, which Python knows of itself

_last = signal.SIGINT  # that came


@contextmanager
def interrupted_by_signal() -> Iterator[asyncio.Task]:
    """Treat SIGTERM, from `async-opd stop`, Slurm or Kubernetes, and SIGHUP, from a terminal that
    is closed, meanwhile as Ctrl-C: the first cancels the main task, which calls this, and the
    second ends at once. So also where Ctrl-C is ignored, as a script's background jobs do."""
    task = asyncio.current_task()
    assert task, "outside of a task"

    def handle(number: int, frame: FrameType | None) -> None:
        if callable(on_ctrl_c := signal.getsignal(signal.SIGINT)):
            on_ctrl_c(number, frame)
        elif task.cancelling():
            raise KeyboardInterrupt
        else:
            task.get_loop().call_soon_threadsafe(task.cancel)

    with _handled_by(handle):
        yield task


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM and SIGHUP meanwhile. In any other thread than the main
    one this does nothing."""
    global _last
    _last = signal.SIGINT

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        with _handled_by(handle):
            yield
    else:
        yield


def last_signal() -> signal.Signals:
    """Return the one of ENDING that came since `ended_by_signal` was entered, else SIGINT. A shell
    reports 128 more for a command that it ends."""
    return _last


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], Any]) -> Generator[None]:
    """Have `handle` take the signals of ENDING meanwhile. SIGHUP stays ignored where it is, as
    nohup has it."""

    def noted(number: int, frame: FrameType | None) -> None:
        global _last
        _last = signal.Signals(number)
        handle(number, frame)

    with signals_as_before(*ENDING):
        for number in ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, noted)
        yield
