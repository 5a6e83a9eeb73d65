"""The lock of a run directory: one run, resume or evaluation at a time works in it.

It is the kernel's (flock), of an open file and not of a path: it follows a directory that is
renamed, and ends with the process that holds it, however that ends. So a LOCK that is left over is
no hindrance, whichever host wrote it: whoever gets the lock knows that the one before is dead. What
is written into the file only tells others who is at work. Over NFS Linux takes the same lock on the
server, for all hosts.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from async_opd.core.errors import ConfigError, RunInUse
from async_opd.core.printing import say
from async_opd.core.run_dir import LOCK

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}  # of a file system that has none
LONGEST = 4096  # bytes of a LOCK
TRIES = 20  # to open a file that others move away, and to read who is about to write his name
PAUSE_S = 0.02


class Holder(Struct, frozen=True, kw_only=True):
    """Who works in a run directory: the content of LOCK while it is held."""

    work: str  # the command
    pid: int
    host: str
    since: str  # local time with its offset

    def __str__(self) -> str:
        return f"{self.work} works in it (pid {self.pid} on host {self.host}, since {self.since})"


@contextmanager
def locked(folder: Path, work: str) -> Generator[None]:
    """Hold the lock of a run directory, for the command `work`, until this is left. Raises RunInUse
    where somebody holds it, and ConfigError where LOCK cannot be opened.

    A file system without locks is told of on stderr, and LOCK believed: a process of this host that
    it names and that lives is at work; of another host nobody can know.
    """
    descriptor = _lock(folder)
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = Holder(work=work, pid=os.getpid(), host=socket.gethostname(), since=since)
        with _naming(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, msgspec.json.encode(holder), 0)
        yield
    finally:
        with suppress(OSError):  # a disk that is gone takes nothing
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Lock the file that is LOCK of `folder` now; returns its descriptor, which no child
    inherits."""
    for _ in range(TRIES):
        with _naming(folder):
            # for writing, without which NFS locks nothing
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(folder / LOCK, flags, 0o666)
        with ExitStack() as unless:
            unless.callback(os.close, descriptor)
            _take(descriptor, folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat()):
                    unless.pop_all()
                    return descriptor
            # somebody has moved the folder, or the file, in between
    raise RunInUse(f"{folder}: others keep moving it")


def _take(descriptor: int, folder: Path) -> None:
    """Take the lock, or raise RunInUse."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunInUse(f"{folder}: {_holder(descriptor) or 'somebody works in it'}") from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise ConfigError(f"{folder}: cannot be locked: {e.strerror}") from e
        holder = _read(descriptor)
        if holder and holder.host == socket.gethostname() and _lives(holder.pid):
            raise RunInUse(f"{folder}: {holder}; if that is no longer so, delete {LOCK}") from e
        left = f"; {LOCK} says: {holder}" if holder else ""
        say(
            f"warning: {folder}: its file system has no locks ({e.strerror}), so nothing keeps"
            f" another run out{left}",
            sys.stderr,
        )


def _holder(descriptor: int) -> Holder | None:
    """Read who holds the lock, once he has written that."""
    for _ in range(TRIES):
        if holder := _read(descriptor):
            return holder
        time.sleep(PAUSE_S)
    return None


def _read(descriptor: int) -> Holder | None:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(os.pread(descriptor, LONGEST, 0), type=Holder)
    return None


def _lives(pid: int) -> bool:
    try:
        os.kill(max(pid, 1), 0)
    except PermissionError:  # another user's
        return pid > 0
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


@contextmanager
def _naming(folder: Path) -> Generator[None]:
    """Raise ConfigError for what a disk refuses."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"{folder}: cannot be locked: {LOCK}: {e.strerror}") from e
