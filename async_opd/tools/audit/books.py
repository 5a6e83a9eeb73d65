"""The books of a run, from its ledger and from what its checkpoints and metrics attest."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from async_opd.config.load import read_run
from async_opd.config.schema import Config
from async_opd.core.errors import RunMissing
from async_opd.core.reading import content_of, refused
from async_opd.core.run_dir import CHECKPOINTS, LEDGER, MANIFEST, METRICS, STATE
from async_opd.driver.checkpoints import RunState, committed
from async_opd.tools.audit.lags import lags
from async_opd.tools.audit.replay import Replay
from async_opd.tools.audit.rows import doubled, steps_of
from async_opd.tools.audit.timeline import Timeline


class Books(Struct, kw_only=True):
    """What became of every prompt by the live records: those behind a checkpoint that the run went
    back to are void."""

    steps: int
    steps_asked: int  # run.steps
    finished: bool
    handed_out: int
    trained: int
    dropped: dict[str, int]  # for good, by cause
    outstanding: list[str]
    failed_rollouts: dict[str, int]  # without which their groups went on, by role
    reissued: dict[str, int]  # by cause
    returned: dict[str, int]
    resumed_at: list[int]  # steps, those void too
    void: int  # records
    discrepancies: list[str]

    def lines(self) -> Iterator[str]:
        """Say the books in words."""
        failed = self.failed_rollouts
        ended = "finished" if self.finished else "not finished"
        resumes = f"at step {', '.join(map(str, self.resumed_at))}" if self.resumed_at else ""
        for name, count, more in (
            ("steps", self.steps, f"of {self.steps_asked}, {ended}"),
            ("handed out", self.handed_out, ""),
            ("  trained", self.trained, ""),
            ("  dropped", sum(self.dropped.values()), _by_cause(self.dropped)),
            ("  outstanding", len(self.outstanding), ""),
            ("lost rollouts", sum(failed.values()), _by_cause(failed)),
            ("re-issued", sum(self.reissued.values()), _by_cause(self.reissued)),
            ("handed back", sum(self.returned.values()), _by_cause(self.returned)),
            ("resumes", len(self.resumed_at), resumes),
            ("void records", self.void, ""),
        ):
            yield f"{name:14}{count:9}  {more}".rstrip()
        yield from self.discrepancies
        yield (
            f"the books do not balance: {len(self.discrepancies)} found"
            if self.discrepancies
            else "the books balance"
        )


def audit(run_dir: Path) -> Books:
    """Read the books of a run, which may be at work. Memory is bounded by what is outstanding at
    once, checkpoints, and 8 bytes a prompt and a sample. Raises RunMissing, and LedgerError for a
    line that is no record."""
    config = read_run(run_dir)
    with refused(f"{run_dir}", RunMissing):
        if not (run_dir / LEDGER).exists():
            raise RunMissing(f"{run_dir}: no {LEDGER} in it")
        return _books(run_dir, config)


def _books(run_dir: Path, config: Config) -> Books:
    """Read the books of the run in `run_dir`, whose config is known."""
    discrepancies: list[str] = []
    # Both are written after what they attest is in the ledger, so they are read before it.
    complete = [
        folder
        for _, folder in sorted(committed(run_dir / CHECKPOINTS).items(), reverse=True)
        if (folder / MANIFEST).exists()
    ]
    rows = steps_of(run_dir / METRICS, discrepancies)
    timeline = Timeline(run_dir / LEDGER, discrepancies)
    newest = timeline.newest(complete)
    replay = Replay(config.groups_per_step, discrepancies)
    for line, record in timeline.live():
        replay.read(record)
        folder = newest.get(line)
        if folder and (state := _state(folder, discrepancies)):
            replay.agrees(f"the checkpoint of step {int(folder.name)}", state.outstanding)
    replay.close(config.run.steps, timeline.live())
    if rows is not None:
        discrepancies += _against(rows, replay.step, timeline.highest, replay.finished)
    discrepancies += doubled(run_dir, rows)
    discrepancies += lags(run_dir, None if timeline.resumed_at else config)
    return Books(
        steps=replay.step,
        steps_asked=config.run.steps,
        finished=replay.finished,
        handed_out=len(replay.handed_out),
        trained=replay.trained,
        dropped=dict(replay.dropped),
        outstanding=list(replay.attempts),
        failed_rollouts=dict(replay.failed),
        reissued=dict(replay.reissued),
        returned=dict(replay.returned),
        resumed_at=timeline.resumed_at,
        void=sum(end - first for first, end in timeline.void),
        discrepancies=discrepancies,
    )


def _state(folder: Path, discrepancies: list[str]) -> RunState | None:
    """Read its run.json; None, and a discrepancy, for one that cannot be read or is another's."""
    try:
        state = msgspec.json.decode(content_of(folder / STATE), type=RunState)
    except (OSError, ValueError, RecursionError) as e:
        discrepancies.append(f"{folder}: its run.json cannot be read: {e}")
        return None
    if state.version != int(folder.name):
        discrepancies.append(f"{folder}: its run.json is of step {state.version}")
    return state


def _against(
    rows: npt.NDArray[np.uint32], step: int, highest: int, finished: bool
) -> Iterator[str]:
    """Say where the steps with a row and the ledger disagree. A kill between the two leaves a
    record without its row."""
    last = int(rows.max(initial=0))
    if last > highest:
        yield f"metrics.jsonl has a row of step {last}, the ledger ends with step {highest}"
    due = np.arange(1, (step if finished else min(step, last)) + 1)
    for missing in np.setdiff1d(due, rows):
        yield f"step {missing} was trained, but metrics.jsonl has no row of it"


def _by_cause(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items()))
