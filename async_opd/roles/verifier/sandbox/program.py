"""Runs one Python program as nobody, in namespaces of its own and within limits.

Of a program three processes are ours: one outside that waits, the first of the pid namespace, with
which the kernel kills whatever else is in it, and the program. The first is not the program itself,
so that nothing the program does keeps it from dying with us.
"""

import fcntl
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NoReturn, Self

from async_opd.core.errors import ConfigError
from async_opd.roles.verifier.sandbox import interpreter, namespaces

PROCESSES = 4  # of a program, threads included
FILE_MIB, FOLDER_MIB = 8, 16
OPEN_FILES = 32
SIGNALS = 128  # that wait to be taken
# Without site-packages.
PYTHON = (interpreter.PYTHON, "-I", "-S", "-X", "utf8", "-X", "int_max_str_digits=0")
# Runs argv[1] as python does, with `exit` and `quit`, which -S takes away; it leaves no names.
LAUNCH = (
    "__import__('site').setquit(); __import__('sys').argv.pop(0); "
    "exec(compile(open(__import__('sys').argv[0], 'rb').read(), __import__('sys').argv[0], 'exec'))"
)
LEFT = b"+"  # sent by a process that is in its namespaces and waits for its users
REFUSED = 125  # exit status of a process that did not become the program
PROBE_S = 10.0


class Program:
    """`source` at work, with `files` as its open files from 0 on; a context manager, which leaves
    nothing behind.

    Each of its processes may have `memory` bytes of address space, and all end at `deadline`, by
    `time.monotonic`. Without `isolated` the limits stay, but it is this user's, and sees and
    reaches what this user does; it may then leave a process behind that made itself a session of
    its own, or, when we are killed, its folder. The limit of processes then counts all of this
    user's, and does not bind root.
    """

    def __init__(
        self, source: str, files: list[int], *, isolated: bool, memory: int, deadline: float
    ):
        self._source, self._files = source, files
        self._isolated = isolated
        self._memory = memory
        self._deadline = deadline
        self._shown = interpreter.needed() if isolated else ()
        self._folder = None if isolated else tempfile.mkdtemp()
        self._ours = 1 if os.geteuid() == 0 else 2  # of our processes count as the program's user

    def __enter__(self) -> Self:
        """Starts the program. Raises OSError if it gets no sandbox."""
        news, low = os.pipe()
        permit, give = os.pipe()
        parent = os.getpid()
        tell = _high(low)
        os.close(low)
        self._pid = os.fork()
        if self._pid == 0:
            os.close(give)
            _or_refuse(tell, lambda: self._enter(parent, tell, permit))
        os.close(tell)
        os.close(permit)
        try:
            with os.fdopen(news, "rb", buffering=0) as child:
                first = child.read(len(LEFT))
                if first == LEFT:
                    namespaces.map_users(self._pid)
                    os.write(give, LEFT)
                    first = b""
                if refusal := first + child.readall():  # else it was closed by the exec
                    raise OSError(0, refusal.decode())
        except OSError:
            self.__exit__()
            raise
        finally:
            os.close(give)
        return self

    def __exit__(self, *_: object) -> None:
        kill = os.kill if self._isolated else os.killpg
        with suppress(ProcessLookupError):
            kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def read(self, fd: int, limit: int) -> bytes:
        """Reads `fd` to its end, the deadline, or a little more than `limit` bytes."""
        output = bytearray()
        while len(output) <= limit and select.select([fd], [], [], self._left())[0]:
            some = os.read(fd, 65536)
            if not some:
                break
            output += some
        return bytes(output)

    def wait(self) -> int | None:
        """Waits for its exit status; None if it is not at its end by the deadline."""
        end = os.pidfd_open(self._pid)
        try:
            if not select.select([end], [], [], self._left())[0]:
                return None
            result = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)  # reaped on leaving
            assert result  # None is what WNOHANG alone may give
            return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status
        finally:
            os.close(end)

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _enter(self, parent: int, tell: int, permit: int) -> None:
        """Becomes the process outside that waits, or without namespaces the program."""
        if self._folder is not None:
            namespaces.die_with(parent)
            os.setsid()
            path = f"{self._folder}/program.py"
            Path(path).write_text(self._source, encoding="utf-8", errors="surrogatepass")
            os.chdir(self._folder)
            self._become(path, tell)
        namespaces.leave()
        os.write(tell, LEFT)
        os.read(permit, 1)
        namespaces.die_with(parent)
        lives, hold = os.pipe()  # one end is open for as long as this process is there
        first = os.fork()
        if first == 0:
            os.close(hold)
            _or_refuse(tell, lambda: self._first(tell, lives))
        _stay_for(first, hold)

    def _first(self, tell: int, lives: int) -> None:
        """Becomes the first process of the pid namespace, which with it comes to its end."""
        namespaces.furnish(self._source, FOLDER_MIB, self._shown)
        namespaces.become_nobody()
        namespaces.die_with(0)  # what an outsider is called
        if select.select([lives], [], [], 0)[0]:
            sys.exit("the parent of this process is gone")
        os.setsid()  # no signal to a process group gets out
        program = os.fork()
        if program == 0:
            _or_refuse(tell, lambda: self._become(namespaces.PROGRAM, tell))
        _stay_for(program, lives)

    def _become(self, path: str, tell: int) -> None:
        namespaces.gain_nothing()
        if self._isolated:
            namespaces.refuse_uncovered_calls()
        for number, fd in enumerate([_high(fd) for fd in self._files]):
            os.dup2(fd, number)
        os.closerange(len(self._files), tell)  # what is from there on closes with the exec
        for limit, value in (
            (resource.RLIMIT_AS, self._memory),
            (resource.RLIMIT_CPU, int(self._left()) + 1),
            (resource.RLIMIT_FSIZE, FILE_MIB << 20),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_NPROC, PROCESSES + self._ours),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_SIGPENDING, SIGNALS),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            resource.setrlimit(limit, (value, value))
        os.execve(PYTHON[0], [*PYTHON, "-c", LAUNCH, path], {})


def probe(*, isolated: bool, memory: int) -> None:
    """Runs a program, to see whether this host allows it. Raises ConfigError."""
    with pipe() as (out, write), open(os.devnull, "r+b", buffering=0) as nothing:
        try:
            with Program(
                "print(6 * 7)",
                [nothing.fileno(), write.fileno(), nothing.fileno()],
                isolated=isolated,
                memory=memory,
                deadline=time.monotonic() + PROBE_S,
            ) as program:
                write.close()
                outcome = program.read(out.fileno(), 100), program.wait()
        except OSError as error:
            outcome = error.strerror
    if outcome != (b"42\n", 0):
        raise ConfigError(
            f"verify.check = 'code': this host does not allow its sandbox ({outcome}), which needs"
            " Linux 5.14 or newer and user namespaces for this user; verify.sandbox = 'none' runs"
            " programs as this user, without one"
        )


@contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """A pipe, its end to read from first."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as out, os.fdopen(write, "wb", buffering=0) as into:
        yield out, into


def _high(fd: int) -> int:
    """Copies `fd` above those that a program is given; an exec closes the copy."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def _or_refuse(tell: int, become: Callable[[], None]) -> NoReturn:
    """Ends this process, if it does not become something else, and tells why not."""
    try:
        become()
    except (OSError, SystemExit, MemoryError, RuntimeError, ValueError) as error:
        os.write(tell, (f"{error}" or type(error).__name__).encode(errors="replace")[:1000])
    finally:  # whatever it is, this copy of the worker does not go on
        os._exit(REFUSED)


def _stay_for(child: int, hold: int) -> NoReturn:
    """Holds nothing but `hold`, buries who dies, and ends as `child` does."""
    os.closerange(0, hold)
    os.closerange(hold + 1, 1024)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
