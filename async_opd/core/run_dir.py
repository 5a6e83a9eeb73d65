"""What a run directory holds, by name; how its lines are read; what may be named instead of it."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from async_opd.core.reading import opened

CONFIG = "config.json"  # the config as it was asked for, with the pool sizes asked for since
LOCK = "lock.json"  # who works in it, and its lock: core.run_lock
ENVIRONMENT = "environment.json"  # commit and versions
# those of a resume which has not gone on yet
NEXT = {CONFIG: "config.next.json", ENVIRONMENT: "environment.next.json"}
METRICS = "metrics.jsonl"  # a row a step
SAMPLES = "samples.jsonl"  # the last recorded trajectories
EARLIER_SAMPLES = "samples.earlier.jsonl"  # and those before them
EVENTS = "events.jsonl"  # who was lost, who came, what was saved
EARLIER_EVENTS = "events.earlier.jsonl"  # and what was before that
LEDGER = "ledger.jsonl"  # what became of every prompt
SPANS = "spans.jsonl"  # who did what when, in the last steps
EARLIER_SPANS = "spans.earlier.jsonl"  # and in those before them
SUMMARY = "summary.json"  # totals; absent until the run ends
CHECKPOINTS = "checkpoints"  # folders of MODEL, LEARNER, STATE, MANIFEST, named by their steps
CHECKPOINT = "checkpoint"  # a link to the newest one's model
MODEL = "model"
LEARNER = "learner"  # what each rank goes on from
STATE = "run.json"  # what the driver goes on from
MANIFEST = "manifest.json"  # size and sha256 of every other file
SET_ASIDE = "set-aside"  # folders 1, 2, ... of what resumes have made void
SELF_TEACHER = "self-teacher"  # the weights that self-teachers take over
TOY_DATA = "data"  # the demo's problems
PROBLEMS = "problems.jsonl"  # of an evaluation: a line a problem
LOGS = "logs"  # what each actor prints, NAME.log
SCALE_REQUEST = "scale-{}.json"  # pool sizes that somebody asks for; {}: an id
SCALE_ANSWER = ".answer"  # instead of the .json of a request

BLOCK = 2**16  # bytes that are read at once from the end of a file
STEP = r"\d{6,}|\.\d{6,}\.partial"  # a folder in CHECKPOINTS

T = TypeVar("T")


def _refuse(number: int, error: ValueError) -> None:
    raise error


def read_lines(
    path: Path,
    decode: Callable[[bytes], T],
    damaged: Callable[[int, ValueError], None] = _refuse,
    torn: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, T]]:
    """Read a file of a record a line, which may be written meanwhile: the offset behind each line,
    and its record.

    `damaged` takes the number of a line that `decode` refuses, and why; by default that is raised.
    `torn` takes that of a last line without its end, which a kill left or a writer is about to
    complete: it counts as not there.
    """
    end = 0
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                torn(number)
                return
            end += len(line)
            try:
                record = decode(line)
            except RecursionError as e:  # JSON that is nested too deep
                damaged(number, ValueError(f"{e}"))
            except ValueError as e:  # msgspec's own among them
                damaged(number, e)
            else:
                yield end, record


def read_back(path: Path) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a file from its last on, each without its end, with the offset behind it; a
    torn last line is none. Memory is that of a line and of BLOCK."""
    with path.open("rb") as file:
        start = end = file.seek(0, os.SEEK_END)
        torn, head = True, b""  # `head`: the end of a line that begins before `start`
        while start:
            size = min(BLOCK, start)
            start = file.seek(start - size)
            head, *lines = (file.read(size) + head).split(b"\n")
            if torn and lines:
                end -= len(lines.pop())
                torn = False
            for line in reversed(lines):
                yield end, line
                end -= len(line) + 1
        if not torn:
            yield end, head


def decode_row(line: bytes) -> dict[str, Any]:
    """Decode an object whose numbers may be NaN, as a metric's may. Raises ValueError."""
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(line), dict[str, Any])


def holds_run(folder: Path) -> bool:
    """Tell whether a folder is one that a run or an evaluation has begun to fill: its CONFIG is an
    object with the sections run, student and data, as the config of nothing else is."""
    try:
        tree = msgspec.json.decode((folder / CONFIG).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return False
    return all(isinstance(tree.get(section), dict) for section in ("run", "student", "data"))


def run_of(path: Path) -> Path:
    """Find the run directory that `path`, which is one or one of its checkpoints, belongs to."""
    checkpoint = checkpoint_at(path)
    return checkpoint.parent.parent if checkpoint else path


def checkpoint_at(path: Path) -> Path | None:
    """Find the checkpoint that `path` names: as RUN/checkpoints/000100, from a working directory
    inside of that, by a link, or by the model in it. None for anything else, such as a run
    directory that lies in a folder `checkpoints`."""
    for named in (path, path.resolve()):
        folder = named.parent if named.name == MODEL else named
        inside = folder.parent.name == CHECKPOINTS
        of_a_run = re.fullmatch(STEP, folder.name) or (folder.parent.parent / CONFIG).exists()
        if inside and of_a_run and not (folder / CONFIG).exists():
            return folder
    return None
