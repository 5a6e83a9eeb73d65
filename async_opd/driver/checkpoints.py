"""The checkpoints of a run directory, from the driver's side: written whole or not at all,
verified, pruned, found.

RUN/checkpoints/000100 is the state after step 100: model/ and learner/, which the learner ranks
write, whatever else the driver puts beside them, run.json and, last, manifest.json with size and
sha256 of every file. RUN/checkpoint is a link to the newest one's model/. Driver and learner ranks
must see the same files: a shared file system is assumed.

While it is written, and again while it is removed, a checkpoint is called .000100.partial. One that
is saved a second time is called .000100.old for the moment between the two renames, and it is the
one that counts then. So whatever instruction is the last before a kill or a power cut, `find` sees
the state before or the state after, and the link leads to a whole model.
"""

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from async_opd.core.errors import CheckpointError
from async_opd.core.run_dir import CHECKPOINTS, checkpoint_at

LINK = "checkpoint"
STATE, MANIFEST = "run.json", "manifest.json"


class RunState(Struct, frozen=True, kw_only=True):
    """What the driver needs to go on from a checkpoint."""

    version: int
    position: dict[str, Any]  # where the prompts stand
    outstanding: list[str]  # ids of the prompts handed out and not trained, in their order
    score: float | None = None  # by which one checkpoint is the best: the higher, the better
    counters: dict[str, Any] = {}


class Checkpoint(NamedTuple):
    """A verified one."""

    folder: Path
    state: RunState


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    size: int
    sha256: str


class Checkpoints:
    """Writes the checkpoints of one run; a run directory has one writer at a time."""

    def __init__(self, run_dir: Path, keep: int):
        """`keep` of the last are kept, and the best."""
        self._root = run_dir / CHECKPOINTS
        self._link = run_dir / LINK
        self._keep = keep

    def begin(self, step: int) -> Path:
        """A fresh folder to write the checkpoint of `step` into. Raises CheckpointError."""
        with _named(step):
            self.recover()
            partial = self._partial(step)
            partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, state: RunState) -> None:
        """Make what was written since `begin` the newest checkpoint, on the disk when this returns.

        Raises CheckpointError where something cannot be written: what was there before is there
        still.
        """
        partial = self._partial(step)
        try:
            with _named(step):
                _write(partial / STATE, msgspec.json.format(msgspec.json.encode(state)))
                _write(partial / MANIFEST, msgspec.json.encode(_described(partial)))
                for folder, _, _ in os.walk(partial):
                    _sync(Path(folder))
                if self._final(step).exists():
                    self._point(partial)
                    _rename(self._final(step), self._old(step))
                self._finish(step)
                self._prune()
        except CheckpointError:
            with suppress(OSError):  # `begin` tries again
                self.recover()
            raise

    def recover(self) -> None:
        """Clear away what a crash, or a save that failed, left behind."""
        for old in self._root.glob(".*.old"):
            step = int(old.name.split(".")[1])
            if not self._final(step).exists():  # so the partial beside it is whole
                self._finish(step)
        if steps := _committed(self._root):
            self._point(steps[max(steps)])
        for left in [*self._root.glob(".*.old"), *self._root.glob(".*.partial")]:
            shutil.rmtree(left, ignore_errors=True)

    def rewind(self, step: int) -> None:
        """Training goes on from the checkpoint of `step`: what was saved later is void, and is
        removed.

        The last goes first, so that a kill on the way leaves one unbroken line.
        """
        with _named(step):
            self.recover()
            self._point(self._final(step))
            for later in sorted(
                (found for found in _committed(self._root) if found > step), reverse=True
            ):
                self._remove(later)

    def _finish(self, step: int) -> None:
        """The whole partial gets its name; an earlier one of the same step has already given it
        up."""
        if self._old(step).exists():
            self._point(self._old(step))
        _rename(self._partial(step), self._final(step))
        self._point(self._final(step))
        shutil.rmtree(self._old(step), ignore_errors=True)

    def _prune(self) -> None:
        steps, best = sorted(_committed(self._root)), _best(self._root)
        for step in steps[: -self._keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        _rename(self._final(step), self._partial(step))
        shutil.rmtree(self._partial(step), ignore_errors=True)  # `recover` tries again

    def _point(self, folder: Path) -> None:
        target = Path(CHECKPOINTS, folder.name, "model")
        if self._link.is_symlink() and self._link.readlink() == target:
            return
        beside = self._link.with_name(f".{LINK}.partial")
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        _rename(beside, self._link)

    def _final(self, step: int) -> Path:
        return self._root / f"{step:06d}"

    def _partial(self, step: int) -> Path:
        return self._root / f".{step:06d}.partial"

    def _old(self, step: int) -> Path:
        return self._root / f".{step:06d}.old"


def find(path: str | Path) -> Checkpoint:
    """The newest checkpoint of the run directory `path`, or the one checkpoint `path`. Changes
    nothing.

    Raises CheckpointError naming the checkpoint, the file and what is wrong with it, and the last
    intact one before.
    """
    path = Path(path)
    folder = checkpoint_at(path) or (path if (path / MANIFEST).exists() else None)
    if folder is None:
        committed = _committed(path / CHECKPOINTS)
        if not committed:
            raise CheckpointError(f"{path}: no complete checkpoint in {path / CHECKPOINTS}")
        folder = committed[max(committed)]
    try:
        return _verified(folder)
    except CheckpointError as e:
        raise CheckpointError(f"{e}; {_offer(folder)}") from None


def choose(run_dir: Path, which: str) -> Checkpoint:
    """The checkpoint of step `which`, or the "best" one. Raises CheckpointError, also as `find`
    does."""
    committed, best = _committed(run_dir / CHECKPOINTS), _best(run_dir / CHECKPOINTS)
    step = best if which == "best" else int(which) if which.isdecimal() else None
    if step not in committed:
        there = ", ".join(
            f"{step} (best)" if step == best else f"{step}" for step in sorted(committed)
        )
        where = f"{run_dir}: no checkpoint {which!r} in {run_dir / CHECKPOINTS}"
        raise CheckpointError(f"{where}; there are: {there or 'none'}")
    return find(committed[step])


def _committed(root: Path) -> dict[int, Path]:
    """Folders that count, by step."""
    found: dict[int, Path] = {}
    for folder in root.iterdir() if root.is_dir() else ():
        if match := re.fullmatch(r"\.(\d{6,})\.old|(\d{6,})", folder.name):
            old, final = match.groups()
            if final or not (root / old).exists():
                found[int(final or old)] = folder
    return found


def _verified(folder: Path) -> Checkpoint:
    def refused(file: str, what: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {folder}: {file} {what}")

    if folder.suffix == ".partial":
        raise CheckpointError(f"checkpoint {folder}: its writing was never finished")
    name = MANIFEST
    try:
        for expected in msgspec.json.decode((folder / MANIFEST).read_bytes(), type=list[_File]):
            name = expected.name
            with (folder / name).open("rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                if size != expected.size:
                    raise refused(name, f"has {size} bytes instead of {expected.size}")
                if hashlib.file_digest(handle, "sha256").hexdigest() != expected.sha256:
                    raise refused(name, "is damaged: its sha256 is not that of the manifest")
        name = STATE
        return Checkpoint(folder, msgspec.json.decode((folder / STATE).read_bytes(), type=RunState))
    except FileNotFoundError:
        raise refused(name, "is missing") from None
    except OSError as e:
        raise refused(name, f"cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise refused(name, f"is damaged: {e}") from e


def _offer(refused: Path) -> str:
    """What to type instead of the refused one."""
    step = re.search(r"\d{6,}", refused.name)
    committed = _committed(refused.parent) if step else {}
    for earlier in sorted((found for found in committed if found < int(step[0])), reverse=True):
        with suppress(CheckpointError):
            intact = _verified(committed[earlier])
            return (
                "the last intact one before it: async-opd train --resume"
                f" {shlex.quote(str(intact.folder))}"
            )
    return "no intact one lies before it"


def _described(folder: Path) -> list[_File]:
    """Every file of `folder`, synced to the disk."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as handle, _about(path):
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
            found.append(
                _File(
                    path.relative_to(folder).as_posix(), os.fstat(handle.fileno()).st_size, sha256
                )
            )
    return found


def _best(root: Path) -> int | None:
    scores = {
        step: score
        for step, folder in _committed(root).items()
        if (score := _score(folder)) is not None
    }
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _score(folder: Path) -> float | None:
    try:
        return msgspec.json.decode((folder / STATE).read_bytes(), type=RunState).score
    except (OSError, ValueError):  # damaged: no reason to stop training, nor to keep it
        return None


def write_whole(path: Path, content: bytes) -> None:
    """A file beside the checkpoints, whole or not at all: a full disk must not cost what is
    there."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    beside.rename(path)


def _write(path: Path, content: bytes) -> None:
    with _about(path), path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _about(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    source.rename(target)
    _sync(target.parent)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors of an open file say which."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextmanager
def _named(step: int) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise CheckpointError(f"checkpoint of step {step}: {e.filename}: {e.strerror}") from e
