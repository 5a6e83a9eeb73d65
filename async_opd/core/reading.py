"""Files and folders that a user names: what the system refuses of them is one line of a named
error."""

import errno
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from async_opd.core.errors import AsyncOpdError, ConfigError

MOST_BYTES = 256 << 20  # of a file that is read as a whole; the largest are rollouts to explain
CHUNK_BYTES = 1 << 16


@contextmanager
def refused(called: str, error: type[AsyncOpdError] = ConfigError) -> Generator[None]:
    """Raise what the system refuses inside as one line of type `error`, which begins with `called`:
    the setting, option or folder."""
    try:
        yield
    except OSError as e:
        raise error(f"{called}: {in_words(e)}") from e


def in_words(error: OSError) -> str:
    """Say what the system refuses, and of which file."""
    file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{file}{error.strerror or error}"


def looked_up(called: str, name: str | Path) -> os.stat_result | None:
    """Ask what lies at `name`; None where nothing does. Raises ConfigError for a name or a place
    that the system refuses."""
    try:
        return os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise ConfigError(f"{called}: {e.strerror}") from e
    except ValueError as e:  # no name of a file at all
        raise ConfigError(f"{called}: {e}") from e


def opened(path: str | Path) -> BufferedReader:
    """Open a file that is to be read to its end: a regular one, or a pipe, which is empty where
    nobody writes it. Raises OSError for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe waits for a writer
    except ValueError as e:
        raise OSError(errno.EINVAL, f"{e}", str(path)) from e
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENODEV
        why = os.strerror(number) if stat.S_ISDIR(mode) else "Is a device, not a file"
        raise OSError(number, why, str(path))
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def content_of(path: str | Path) -> bytes:
    """Read a file as a whole. Raises OSError, for more than MOST_BYTES too."""
    content = bytearray()
    with opened(path) as file:
        while piece := file.read(CHUNK_BYTES):
            content += piece
            if len(content) > MOST_BYTES:
                raise OSError(errno.EFBIG, f"Has more than {MOST_BYTES >> 20} MiB", str(path))
    return bytes(content)


def read_named(called: str, path: str | Path, error: type[AsyncOpdError] = ConfigError) -> bytes:
    """Read a file that a user names, as a whole. Raises `error`, which begins with `called`, and
    suggests the nearest name where there is no such file."""
    from async_opd.core.suggest import beside  # its imports are for mistakes only

    try:
        return content_of(path)
    except FileNotFoundError as e:
        raise error(f"{called}: no such file{beside(path)}") from e
    except OSError as e:
        raise error(f"{called}: {e.strerror}") from e
