"""Lines for whoever watches, printed so that they never hold a run up: `say` in place of `print`,
which waits for as long as a pipe is full or a terminal stands still."""

import io
import os
import sys
import threading
from contextlib import suppress
from typing import TextIO

SAY_S = 2.0  # for a line to leave


def say(text: str, to: TextIO | None = None) -> None:
    """Print `text` to `to`, stdout by default. One that is full, gone or read by nobody loses it,
    and holds the caller up for SAY_S seconds at most."""

    stream: TextIO | None = to or sys.stdout
    if stream is None:  # a process without that one
        return

    def out() -> None:
        with suppress(OSError):
            write(stream, f"{text}\n")

    thread = threading.Thread(target=out, daemon=True)
    thread.start()
    thread.join(SAY_S)


def write(to: TextIO, text: str) -> None:
    """Write past the buffer of `to`: a write that blocks would hold its lock, and the interpreter
    could not exit."""
    try:
        descriptor = to.fileno()
    except io.UnsupportedOperation:
        # no file: a notebook's, or what has taken its place while a screen is up
        to.write(text)
        return
    data = text.encode(errors="backslashreplace")
    while data:
        data = data[os.write(descriptor, data) :]
