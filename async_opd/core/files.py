"""Files and folders that are there whole or not at all, whatever instruction is the last before a
kill or a power cut: written beside their place, put on the disk, then renamed.

Until then `path` is called `partial(path)`. One that a kill left behind is no hindrance.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from async_opd.core.errors import ConfigError


def from_home(text: str) -> str:
    """Put the home of this user, or of another, in place of the ~ that a path begins with. Raises
    ConfigError where there is no such user."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ConfigError(f"{text}: there is no user {text[1:].split('/')[0]!r} here")
    return path


def partial(path: Path) -> Path:
    """Name what becomes `path` while it is written."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it: a full disk does not cost what is there."""
    write(partial(path), content)
    rename(partial(path), path)


def begin_folder(path: Path) -> Path:
    """Make a fresh folder to fill, which `commit_folder` turns into `path`."""
    shutil.rmtree(partial(path), ignore_errors=True)
    partial(path).mkdir(parents=True)
    return partial(path)


def commit_folder(path: Path, replace: bool = False) -> None:
    """Give what was written since `begin_folder` its name, once every file of it is on the disk.
    Where there is one of that name, this fails, or does without for a moment to `replace` it."""
    for written in (*partial(path).rglob("*"), partial(path)):
        sync(written)
    aside = path.with_name(f".{path.name}.replaced")
    if replace and path.exists():  # which cannot be emptied while somebody reads it over NFS
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    rename(partial(path), path)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder: it is gone as a whole, or still there. `begin_folder` clears up what cannot
    be deleted."""
    rename(path, partial(path))
    shutil.rmtree(partial(path), ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Write a file inside of a folder that is not committed yet; it is on the disk when this
    returns."""
    with _naming(path):
        path.write_bytes(content)
    sync(path)


def rename(source: Path, target: Path) -> None:
    """Rename for good: the new name is on the disk when this returns."""
    source.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Name the file in errors of one that is open already."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise
