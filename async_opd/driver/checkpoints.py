"""The checkpoints of a run directory, from the driver's side: written whole or not at all,
verified, pruned, found.

RUN/checkpoints/000100 is the state after step 100: model/ and learner/, which the learner ranks
write, whatever else the driver puts beside them, run.json and, last, manifest.json with size and
sha256 of every file. RUN/checkpoint is a link to the newest one's model/. Driver and learner ranks
must see the same files: a shared file system is assumed.

While it is written, and again while it is removed, a checkpoint is called .000100.partial. So
whatever instruction is the last before a kill or a power cut, `find` sees the state before or the
state after, and the link leads to a whole model.
"""

import re
import shlex
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from async_opd.core import files
from async_opd.core.aside import DaemonThread
from async_opd.core.errors import CheckpointError, CheckpointNotSaved
from async_opd.core.reading import content_of, refused
from async_opd.core.run_dir import (
    CHECKPOINT,
    CHECKPOINTS,
    MANIFEST,
    MODEL,
    STATE,
    checkpoint_at,
)
from async_opd.driver import set_aside
from async_opd.driver.manifest import File, names, unlisted


class RunState(Struct, frozen=True, kw_only=True):
    """What the driver needs to go on from a checkpoint."""

    version: int
    position: dict[str, Any]  # where the prompts stand
    outstanding: list[str]  # ids of the prompts handed out and not trained, in their order
    score: float | None = None  # by which one checkpoint is the best: the higher, the better
    counters: dict[str, Any] = {}
    # settings that a run goes on with as they were, by name; none: an earlier version saved it
    fixed: dict[str, Any] = {}


class _Files(Struct, frozen=True):
    """What STATE says, besides, of the checkpoint that it is part of."""

    files: list[str] | None = None  # all others but the manifest; absent: an earlier version's


class Checkpoint(NamedTuple):
    """A verified one."""

    folder: Path
    state: RunState


@cache
def thread_of(run_dir: Path) -> DaemonThread:
    """Make the one thread of this process that reads and writes the checkpoints of a run directory.
    A save that was given up, and still goes on, is over before the next start looks at them."""
    return DaemonThread(f"checkpoints of {run_dir}")


class Checkpoints:
    """Writes the checkpoints of one run; a run directory has one writer at a time."""

    def __init__(self, run_dir: Path, keep: int):
        """`keep` of the last are kept, and the best."""
        self._root = run_dir / CHECKPOINTS
        self._link = run_dir / CHECKPOINT
        self._keep = keep

    def begin(self, step: int) -> Path:
        """Make a fresh folder to write the checkpoint of `step` into. Raises CheckpointError, also
        for a step that is there already: to replace it would be to lose it for a moment."""
        with refused(f"checkpoint of step {step}", CheckpointNotSaved):
            self.recover()
            if self.holds(step):
                raise CheckpointError(f"checkpoint of step {step}: it is saved already")
            return files.begin_folder(self._folder(step))

    def commit(self, step: int, state: RunState) -> None:
        """Make what was written since `begin` the newest checkpoint, on the disk when this returns.

        Raises CheckpointError where something cannot be written: what was there before is there
        still, and `holds` says whether the new one is, too.
        """
        partial = files.partial(self._folder(step))
        try:
            with refused(f"checkpoint of step {step}", CheckpointNotSaved):
                content = msgspec.to_builtins(state) | {"files": names(partial)}
                files.write(partial / STATE, msgspec.json.format(msgspec.json.encode(content)))
                manifest = [File.of(partial, name) for name in names(partial)]
                files.write(partial / MANIFEST, msgspec.json.encode(manifest))
                files.commit_folder(self._folder(step))
                self._point(step)
                self._prune()
        except CheckpointError:
            with suppress(OSError):  # `begin` tries again
                self.recover()
            raise

    def holds(self, step: int) -> bool:
        """Whether there is a whole one of `step`."""
        return self._folder(step).exists()

    def recover(self) -> None:
        """Clear away what a crash, or a save that failed, left behind."""
        if steps := committed(self._root):
            self._point(max(steps))
        for left in self._root.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def rewind(self, step: int) -> Path | None:
        """Go on from the checkpoint of `step`: what was saved later is void, and is set aside with
        a copy of the books; returns the folder, None where nothing was.

        The last goes first, so that a kill on the way leaves one unbroken line.
        """
        with refused(f"what lies behind step {step}", CheckpointNotSaved):
            self.recover()
            if self.holds(step):  # there is none of the start
                self._point(step)
            void = sorted((later for later in committed(self._root) if later > step), reverse=True)
            if not void:
                return None
            aside = set_aside.begin(self._root.parent)
            for later in void:
                folder = self._folder(later)
                files.rename(folder, aside / CHECKPOINTS / folder.name)
            files.sync(self._root)  # none is found here any more
            Checkpoints(aside, self._keep).recover()  # its link
            return aside

    def _prune(self) -> None:
        steps, best = sorted(committed(self._root)), _best(self._root)
        for step in steps[: -self._keep]:
            if step != best:
                files.remove_folder(self._folder(step))

    def _point(self, step: int) -> None:
        target = Path(CHECKPOINTS, self._folder(step).name, MODEL)
        if self._link.is_symlink() and self._link.readlink() == target:
            return
        beside = files.partial(self._link)
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        files.rename(beside, self._link)

    def _folder(self, step: int) -> Path:
        return self._root / f"{step:06d}"


def find(path: Path) -> Checkpoint:
    """Find the newest checkpoint of the run directory `path`, or the one checkpoint `path`. Changes
    nothing.

    Raises CheckpointError naming the checkpoint, the file and what is wrong with it, and the last
    intact one before.
    """
    folder = checkpoint_at(path) or (path if (path / MANIFEST).exists() else None)
    if folder is None:
        folders = committed(path / CHECKPOINTS)
        if not folders:
            raise CheckpointError(f"{path}: no complete checkpoint in {path / CHECKPOINTS}")
        folder = folders[max(folders)]
    try:
        return _verified(folder)
    except CheckpointError as e:
        raise CheckpointError(f"{e}; {_offer(folder)}") from None


def newest(run_dir: Path, start: dict[str, Any]) -> Checkpoint:
    """Find the newest checkpoint of a run, as `find` does, or its start, where the prompts stand at
    position `start`, while there is none."""
    if committed(run_dir / CHECKPOINTS):
        return find(run_dir)
    return Checkpoint(run_dir, RunState(version=0, position=start, outstanding=[]))


def choose(run_dir: Path, which: str) -> Checkpoint:
    """Find the checkpoint of step `which`, or the "best" one. Raises CheckpointError, also as
    `find` does."""
    folders, best = committed(run_dir / CHECKPOINTS), _best(run_dir / CHECKPOINTS)
    step = best if which == "best" else int(which) if re.fullmatch(r"\d{1,18}", which) else None
    if step not in folders:
        there = ", ".join(
            f"{step} (best)" if step == best else f"{step}" for step in sorted(folders)
        )
        raise CheckpointError(
            f"{run_dir}: no checkpoint {which!r} in {run_dir / CHECKPOINTS}; there are:"
            f" {there or 'none'}"
        )
    return find(folders[step])


def committed(root: Path) -> dict[int, Path]:
    """List the folders that count, by step."""
    folders = root.iterdir() if root.is_dir() else ()
    return {int(folder.name): folder for folder in folders if re.fullmatch(r"\d{6,}", folder.name)}


def _verified(folder: Path) -> Checkpoint:
    def flaw(file: str, what: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {folder}: {file} {what}")

    if folder.suffix in (".partial", ".old"):  # earlier versions replaced by way of .000100.old
        raise CheckpointError(f"checkpoint {folder}: its writing was never finished")
    name = MANIFEST
    listed: set[str] = set()
    try:
        for expected in msgspec.json.decode(content_of(folder / MANIFEST), type=list[File]):
            name = expected.name
            listed.add(name)
            file = File.of(folder, name)
            if file.size != expected.size:
                raise flaw(name, f"has {file.size} bytes instead of {expected.size}")
            if file.sha256 != expected.sha256:
                raise flaw(name, "is damaged: its sha256 is not that of the manifest")
        name = STATE
        content = content_of(folder / STATE)
        state = msgspec.json.decode(content, type=RunState)
        if missing := unlisted(listed, msgspec.json.decode(content, type=_Files).files):
            raise flaw(MANIFEST, f"does not list {missing}, which is part of a checkpoint")
        return Checkpoint(folder, state)
    except FileNotFoundError:
        raise flaw(name, "is missing") from None
    except OSError as e:
        raise flaw(name, f"cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise flaw(name, f"is damaged: {e}") from e


def _offer(damaged: Path) -> str:
    """Say what to type instead of the damaged one."""
    named = re.search(r"\d{6,}", damaged.name)
    folders = committed(damaged.parent) if named else {}
    for step, folder in sorted(folders.items(), reverse=True):
        if named and step < int(named[0]):
            with suppress(CheckpointError):
                return (
                    "the last intact one before it: async-opd train --resume"
                    f" {shlex.quote(str(_verified(folder).folder))}"
                )
    return "no intact one lies before it"


def _best(root: Path) -> int | None:
    scores = {
        step: score
        for step, folder in committed(root).items()
        if (score := _score(folder)) is not None
    }
    return max(scores, key=lambda step: (scores[step], step), default=None)


def _score(folder: Path) -> float | None:
    try:
        return msgspec.json.decode(content_of(folder / STATE), type=RunState).score
    except (
        OSError,
        ValueError,
        RecursionError,
    ):  # damaged: no reason to stop training, nor to keep it
        return None
