"""Standard streams of a command: closed ones, full ones, and the one line of a mistake."""

import io
import os
import sys
from contextlib import suppress

MOST = 2000  # characters of the line of a mistake


def repair_streams() -> None:
    """Give a standard stream that is closed a place that takes nothing, so that no file that is
    opened gets its number; what the encoding of another has no place for is written as an
    escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            instead = os.open(os.devnull, os.O_RDONLY)
            if instead != number:
                os.dup2(instead, number)
                os.close(instead)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (for good)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> str:
    """Lose what is printed and cannot leave, which would be tried again at exit; say why it cannot,
    nothing where all has left."""
    try:
        sys.stdout.flush()
        with suppress(io.UnsupportedOperation):  # no file
            os.write(sys.stdout.fileno(), b"")  # what is not buffered is lost by now
        return ""
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.strerror(e.errno or 0)


def one_line(text: str) -> str:
    """Put an error on one line of bounded length, with what moves a terminal's cursor escaped."""
    line = " ".join(text.splitlines())
    line = line if len(line) <= MOST else f"{line[:MOST]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def complain(text: str) -> None:
    """Print to standard error, as the command."""
    from async_opd.core.printing import say

    say(f"async-opd: {text}", sys.stderr)
