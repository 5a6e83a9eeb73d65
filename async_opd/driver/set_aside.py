"""What a resume makes void, and keeps: RUN/set-aside/1, /2, ...

A run that goes back to an older checkpoint leaves a whole run there, with its later checkpoints and
a copy of its books as they were: it can be evaluated, exported, audited and gone on with. One that
goes on from its newest checkpoint leaves the rows behind that, and a summary, where there are any.
"""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from shutil import copyfileobj

import msgspec
from msgspec import Struct

from async_opd.core import files
from async_opd.core.run_dir import (
    CHECKPOINTS,
    CONFIG,
    EARLIER_EVENTS,
    EARLIER_SAMPLES,
    ENVIRONMENT,
    EVENTS,
    LEDGER,
    METRICS,
    NEXT,
    SAMPLES,
    SET_ASIDE,
    SUMMARY,
    decode_row,
    read_back,
)

ROWS = (METRICS, EARLIER_SAMPLES, SAMPLES)  # whose lines have a step, in order
BOOKS = (CONFIG, ENVIRONMENT, EARLIER_EVENTS, EVENTS, LEDGER, *ROWS, SUMMARY)


class _Row(Struct):
    """Of a line of ROWS."""

    step: int


def begin(run_dir: Path) -> Path:
    """Make the folder that takes the later checkpoints of `run_dir`, with a copy of all books;
    returns it, on the disk."""
    folder = _copies(run_dir, dict.fromkeys(BOOKS, 0))
    (folder / CHECKPOINTS).mkdir()
    files.sync(folder)
    return folder


def cut(run_dir: Path, version: int, copied: bool) -> Path | None:
    """Cut off the rows of steps behind `version`, and the summary of a run that had ended: training
    goes on behind it, with the config of the resume. Not before the ledger says so: it would miss
    the rows.

    Unless they are `copied` already, they are kept in a new folder, which is returned where it
    holds rows. Reads no more than what is cut off.
    """
    cuts = {
        name: end
        for name in ROWS
        if (run_dir / name).exists()
        and (end := _kept(run_dir / name, version)) < (run_dir / name).stat().st_size
    }
    whole = {SUMMARY: 0} if (run_dir / SUMMARY).exists() else {}
    folder = None if copied or not (cuts or whole) else _copies(run_dir, cuts | whole)
    for name, end in cuts.items():
        with (run_dir / name).open("r+b") as file:
            file.truncate(end)
        files.sync(run_dir / name)
    (run_dir / SUMMARY).unlink(missing_ok=True)
    for name, coming in NEXT.items():
        if (run_dir / coming).exists():
            files.rename(run_dir / coming, run_dir / name)
    return folder if cuts else None


def _kept(path: Path, version: int) -> int:
    """Find the offset behind the last row of a step up to `version`; what is no row counts as void
    with those beside it."""
    for end, line in read_back(path):
        try:
            row = msgspec.convert(decode_row(line), _Row)
        except ValueError:
            continue
        if row.step <= version:
            return end
    return 0


def _copies(run_dir: Path, starts: Mapping[str, int]) -> Path:
    """Copy files of those names, from the given offsets on, into a new folder of SET_ASIDE: it is
    there whole or not at all."""
    root = run_dir / SET_ASIDE
    folder = next(root / f"{n}" for n in count(1) if not (root / f"{n}").exists())
    beside = files.begin_folder(folder)
    for name, start in starts.items():
        source = run_dir / name
        if source.exists():
            with source.open("rb") as old, (beside / name).open("wb") as new:
                old.seek(start)
                copyfileobj(old, new)
    files.commit_folder(folder)
    files.sync(run_dir)  # the name of SET_ASIDE
    return folder
