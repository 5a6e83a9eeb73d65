"""What an actor, and every process that it starts, prints: RUN/logs/NAME.log, where its node sees
that file.

The driver writes a line at which the actor begins; an actor that finds it there puts its standard
output and error behind it, as file descriptors: a trace, an engine's core, C++ and all. One with
another disk leaves them where Ray has them. A replacement, or a restart, goes on in the same file.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from async_opd.core.aside import aside
from async_opd.core.errors import TimedOut

LINES = 20  # the last ones, for who looks at an error
TAIL_BYTES = 2**16  # in which they are
MOST_BYTES = 16 * 2**20  # of a file, before what is in it becomes that of the earlier one
EARLIER = ".earlier.log"
LOOK_S = 10.0  # between two looks at its size
CONTROL = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07)")  # colours, titles
UNSAFE = re.compile(r"[^\w.-]")  # in a file's name
CAUSE = re.compile(r"\b[A-Za-z_][\w.]*(?:Error|Exception)\b: .*")
ELSEWHERE = "See root cause above"  # of vLLM, which has printed the cause before
CAUSE_CHARACTERS = 200
READ_S = 5.0  # to look into a file
NAMED = "its output is in "


class ActorLog(NamedTuple):
    """The driver's side."""

    path: str
    line: str  # at which the actor begins; empty: there is no file

    @classmethod
    def begun(cls, folder: Path, name: str) -> "ActorLog":
        """Begin the log of the member `name`, such as "generator 0", in `folder`; there is none
        where the disk refuses it, for which nobody's start fails."""
        path = folder / f"{UNSAFE.sub('-', name)}.log"
        line = f"---- {name} starts, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, {time.time_ns()}"
        try:
            folder.mkdir(exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())
        except OSError:
            return cls(f"{path}", "")
        return cls(f"{path}", line)

    async def words(self) -> str:
        """Say where the output of the actor is, and what of it tells how it ended."""
        lines = None
        if self.line:
            with suppress(OSError, TimedOut):
                lines = await aside(READ_S, self.path, printed, Path(self.path), self.line)
        if lines is None:
            return f"{NAMED}Ray's files on its node, worker-*.err among the logs of its session"
        return f"{NAMED}{self.path}: {cause(lines)}"


def follow(path: Path, line: str) -> None:
    """In the actor: print into the file at `path` from now on, where its driver's `line` is there;
    else, and where there is no `line`, leave everything as it is."""
    if not line:
        return
    with suppress(OSError):
        if line not in _tail(path).splitlines():
            return
        print(f"what follows is in {path}", flush=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)
        threading.Thread(target=_bound, args=(path,), name="log", daemon=True).start()


def printed(path: Path, line: str) -> list[str] | None:
    """Read what the actor has printed since its `line`, the end of it where that is much, without
    what is for terminals; None where it has not found the file. Raises OSError."""
    _, mine, text = _tail(path).rpartition(f"{line}\n")
    return None if mine and not text else shown(text)


def shown(text: str) -> list[str]:
    """Take the lines of `text` that say something, as a terminal would show them in the end."""
    lines = (CONTROL.sub("", each).rstrip() for each in text.split("\n"))
    return [each.rpartition("\r")[2] for each in lines if each.rpartition("\r")[2]]


def cause(lines: Sequence[str]) -> str:
    """Find what ended an actor in the last LINES that it has printed: an error's own line, or the
    last one. Where they say that it stands ELSEWHERE, as far above as a trace is long, it is looked
    for in all."""
    last = lines[-LINES:]
    searched = lines if any(ELSEWHERE in line for line in last) else last
    named = [match[0] for line in searched if (match := CAUSE.search(line))]
    chosen = [each for each in named if ELSEWHERE not in each] or [*last]
    return chosen[-1][:CAUSE_CHARACTERS] if chosen else "it has printed nothing"


def printed_in(text: str) -> list[tuple[Path, list[str]]]:
    """List the logs that an error's `text` names, as it is named by NAMED, with their last lines;
    those that cannot be read are left out."""
    logs: list[tuple[Path, list[str]]] = []
    for name in dict.fromkeys(re.findall(rf"{NAMED}(/.*?\.log)(?=[;,:)]|$)", text)):
        with suppress(OSError):
            logs.append((Path(name), shown(_tail(Path(name)))[-LINES:]))
    return logs


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL_BYTES, 0))
        return file.read().decode(errors="replace")


def _earlier(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".log") + EARLIER)


def _bound(path: Path) -> None:
    """Keep the file from filling the disk: what is in it becomes the earlier one's, and it begins
    anew. Every process that prints has it open, and appends; a line between the two is lost."""
    while True:
        time.sleep(LOOK_S)
        with suppress(OSError):
            turn_over(path)


def turn_over(path: Path) -> None:
    """Begin the file anew where it holds MOST_BYTES. Raises OSError."""
    if path.stat().st_size >= MOST_BYTES:
        shutil.copyfile(path, _earlier(path))
        os.truncate(path, 0)
