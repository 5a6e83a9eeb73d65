"""Settings of the whole process, changed for a while and put back: the process may be a caller's,
who has others."""

import gc
import logging
import os
import signal
from collections.abc import Generator
from contextlib import ExitStack, contextmanager


@contextmanager
def log_level(level: int, *of: logging.Logger | logging.Handler) -> Generator[None]:
    """Let none of these loggers and handlers pass anything below `level` on meanwhile."""
    with ExitStack() as undo:
        for each in of:
            undo.callback(each.setLevel, each.level)
            each.setLevel(level)
        yield


@contextmanager
def environment(**values: str) -> Generator[None]:
    """Give these variables of the environment these values meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def signals_as_before(*numbers: signal.Signals) -> Generator[None]:
    """Have these signals do afterwards what they did before, whoever has set a handler meanwhile.
    In the main thread only."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: it was not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def held_back(*numbers: signal.Signals) -> Generator[None]:
    """Have these signals come to this thread afterwards, and never to the threads and processes
    that it starts meanwhile, nor to those that these start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """Leave garbage alone meanwhile, as while vLLM, torch or transformers are imported: of the
    thousands of modules that stay for good each full collection looks through all that are there, a
    fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
