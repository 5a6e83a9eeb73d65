"""Whole runs of the command line with the demo's models: few parameters, every path."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from async_opd.tools.audit.books import audit
from tests.e2e.conftest import SMALL, Job, rows
from tests.faults.harness import Hurt
from tests.gpu.place import LIMIT_S, Place, Record

STEPS = 3
FIGURES = ("elapsed_s", "trained_tokens_per_s", "loss", "parity_gap")  # of a row


def three_steps(place: Place, record: Record, overrides: tuple[str, ...]) -> None:
    """`async-opd train` takes three steps and ends well, and its books balance."""
    folder = place.folder / "run"
    settings = (f"run.dir={folder}", f"run.steps={STEPS}", *SMALL, *layout(place, overrides))
    with no_job_left():
        job = Job("train", "configs/demo.toml", *settings, folder=place.folder)
        with suppress(subprocess.TimeoutExpired):
            job.wait(within_s(place))
        status = job.process.poll()
        assert status == 0, f"exit status {status}: {job.text().strip().splitlines()[-1:]}"
        left = job.gone_within(10)
    record_steps(folder, record)
    assert audit(folder).discrepancies == []
    assert left == [], f"processes outlive the run: {left}"


def killed_generator(place: Place, record: Record, overrides: tuple[str, ...]) -> None:
    """A generator that is killed costs itself: training goes on with the other."""
    with no_job_left():
        hurt = Hurt(place.folder, "rollout.generators=2", *layout(place, overrides))
        hurt.trains(1, within_s(place))
        killed = hurt.hurt("generator")
        noticed = hurt.told("lost", "generator", killed, within_s(place))
        hurt.trains(1, within_s(place))
        record("killed", noticed_s=noticed, next_step_s=time.time() - killed)
        hurt.interrupt()
        record("books", steps=hurt.steps(), discrepancies=len(hurt.books().discrepancies))


def within_s(place: Place) -> float:
    """Bound a wait: on a card by what its check may take, on a CPU by what a busy one does."""
    return LIMIT_S if place.device == "cuda" else 5 * LIMIT_S


def layout(place: Place, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The settings of a run on cards, in bfloat16 as by default; on a CPU those of the demo."""
    return () if place.device == "cpu" else overrides


def record_steps(folder: Path, record: Record) -> None:
    """Record what was logged of each step."""
    steps = rows(folder)
    for row in steps:
        figures = {key: row[key] for key in FIGURES if row[key] is not None}
        record(f"step {row['step']}", **figures)
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))


@contextmanager
def no_job_left() -> Iterator[None]:
    """Kill what a check leaves running, and print what it has said."""
    try:
        yield
    finally:
        for job in Job.started:
            for process in job.processes():
                process.kill()
            print(job.text(), flush=True)
