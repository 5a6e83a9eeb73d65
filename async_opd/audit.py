"""Proves from a run's ledger that no prompt was lost and none trained twice, relative to the state it was resumed from."""

from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from async_opd.config import Config
from async_opd.errors import LedgerError, RunMissing
from async_opd.stream.ledger import (
    Checkpoint,
    Dropped,
    Finished,
    Out,
    Record,
    Reissued,
    Resumed,
    Returned,
    Trained,
    records,
)


class Books(Struct, kw_only=True):
    """What became of every prompt, in the live records: those since a checkpoint that the run went back to are void."""

    steps: int
    steps_asked: int  # run.steps
    finished: bool
    handed_out: int
    trained: int
    dropped: dict[str, int]  # by cause, as the next two
    reissued: dict[str, int]
    returned: dict[str, int]
    outstanding: list[str]
    resumes: list[int]  # steps of the checkpoints
    void: int  # records
    discrepancies: list[str]


class Saved(Struct):
    """What a checkpoint's run.json says of the books."""

    version: int
    outstanding: list[str]


def audit(run_dir: Path) -> Books:
    """The books of a run. Memory is bounded by what is outstanding at once, with 8 bytes for each prompt handed out."""
    ledger = run_dir / "ledger.jsonl"
    for needed in (run_dir, run_dir / "config.json", ledger):
        if not needed.exists():
            raise RunMissing(f"{needed}: no such file or folder; `audit` needs the directory of a run")
    config = msgspec.json.decode((run_dir / "config.json").read_bytes(), type=Config)
    time = _Timeline(ledger)
    found = time.found
    saved, at = _newest_checkpoint(run_dir / "checkpoints", time)
    replay = _Replay(config.groups_per_step, found)
    for line, record in time.live(ledger):
        replay.read(record)
        if saved and line == at:
            found += _differences(f"checkpoint of step {saved.version}", saved.outstanding, list(replay.outstanding))
    replay.close(config.run.steps)
    found += _handed_out_twice(replay.seen, time.live(ledger))
    found += _missing_rows(run_dir / "metrics.jsonl", time.highest, replay)
    return Books(
        steps=replay.step,
        steps_asked=config.run.steps,
        finished=replay.finished,
        handed_out=len(replay.seen),
        trained=replay.trained,
        dropped=dict(replay.dropped),
        reissued=dict(replay.reissued),
        returned=dict(replay.returned),
        outstanding=list(replay.outstanding),
        resumes=time.resumes,
        void=sum(last - first for first, last in time.void),
        discrepancies=found,
    )
