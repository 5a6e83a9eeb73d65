"""A new run directory, and the record of what a run is made with."""

import asyncio
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from async_opd.core.errors import AsyncOpdError, ConfigError
from async_opd.core.files import partial, write_file
from async_opd.core.run_dir import (
    CHECKPOINTS,
    CONFIG,
    LEDGER,
    LOCK,
    PROBLEMS,
    SET_ASIDE,
    holds_run,
)
from async_opd.core.run_lock import locked

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")
GIT_S = 10.0  # to name the commit


@contextmanager
def new_dir(path: Path, asked: Struct, work: str) -> Iterator[Path]:
    """Make the directory of a run, or of an evaluation, new, and hold its lock for the command
    `work`; `asked` becomes its CONFIG, by which it is known as one of ours.

    One of ours that is there already is kept beside under a number, if nobody works in it; an empty
    folder is used, and any other refused. A mistake that shows before the first prompt is handed
    out, or a Ctrl-C, leaves everything as it was. Raises ConfigError and RunInUse.
    """
    if path.is_symlink():  # the run is where it leads to, then as before
        path = Path(os.path.realpath(path))
    parents = [parent for parent in path.parents if not parent.exists()]
    fresh = not path.exists()
    with ExitStack() as held:
        try:
            earlier = _made(path, work, held)
            write_file(path / CONFIG, msgspec.json.format(msgspec.json.encode(asked)))
        except OSError as e:
            raise ConfigError(f"run.dir = {str(path)!r}: cannot be made: {e.strerror}") from e
        beside = parents if fresh else []

        def undo(error: BaseException) -> None:
            _undo(path, beside, earlier, error, keep=not fresh and not earlier)

        try:
            yield path
        except AsyncOpdError as e:
            if e.exit_status == 2 and not _begun(path):
                undo(e)
            raise
        except asyncio.CancelledError as e:
            if not any(file.stat().st_size for file in _begun(path)):
                undo(e)
                e.add_note(f"{path} is as it was")
            raise


def _begun(path: Path) -> list[Path]:
    """List the files that the first prompt, or the first problem, goes into, where they exist."""
    return [file for file in (path / LEDGER, path / PROBLEMS) if file.exists()]


def _made(path: Path, work: str, held: ExitStack) -> Path | None:
    """Make the directory, whose lock is `held` then; return where the one before it is now."""
    _refuse_kept(path)
    _ours(path)  # before anything is written into it
    path.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(path, work))
    if not _ours(path):
        return None
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    earlier = next(other for other in others if not other.exists())
    with ExitStack() as inside:  # what was set aside may be gone on with there
        for lock in sorted(path.rglob(LOCK)):
            if lock.parent != path and holds_run(lock.parent):
                inside.enter_context(locked(lock.parent, work))
        path.rename(earlier)
    path.mkdir()
    held.enter_context(locked(path, work))
    return earlier


def _refuse_kept(path: Path) -> None:
    """Raise ConfigError for a place among what another run has saved, or set aside."""
    place = Path(os.path.realpath(path))
    for folder in (place, *place.parents):
        if folder.name in (CHECKPOINTS, SET_ASIDE) and holds_run(folder.parent):
            raise ConfigError(
                f"run.dir = {str(path)!r}: lies in {folder}, where the run of {folder.parent} keeps"
                " what is its own; name a folder elsewhere"
            )


def _ours(path: Path) -> bool:
    """Tell whether there is a directory of ours, rather than none or an empty one. Raises
    ConfigError for any other, which nobody has asked us to move."""
    names = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
    if holds_run(path) or not {*names} - {LOCK, partial(path / CONFIG).name}:  # begun just now
        return bool(names) and holds_run(path)
    inside = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise ConfigError(
        f"run.dir = {str(path)!r}: holds {inside}, and no {CONFIG} of a run: only an earlier run is"
        f" moved aside; name a new folder, such as {str(path / 'run')!r}"
    )


def _undo(
    path: Path, parents: list[Path], earlier: Path | None, error: BaseException, *, keep: bool
) -> None:
    """Leave everything as it was; `keep` a folder that was there, and empty. What the disk refuses
    is a note of `error`."""
    try:
        shutil.rmtree(path)
        if keep:
            path.mkdir()
        for folder in parents:
            with suppress(OSError):  # of what others have put there since
                folder.rmdir()
        if earlier:
            earlier.rename(path)
    except OSError as left:
        kept = f"; the earlier run is in {earlier}" if earlier else ""
        error.add_note(f"not removed: {left.filename}: {left.strerror}{kept}")


def environment(**others: Any) -> dict[str, Any]:
    """Look up the git commit and the versions of PACKAGES, and put `others` beside them."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        git = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_S)
        commit = git.stdout.strip() or None
    return {
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES},
        **others,
    }
