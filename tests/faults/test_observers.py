"""Observers that block, raise or fill the disk: training does not notice, and what they miss is
counted."""

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from async_opd.telemetry import metrics
from async_opd.telemetry.console.lines import Lines
from async_opd.telemetry.metrics import Jsonl, observed
from tests.simulated.roles import LONGEST_S, Pace
from tests.simulated.runs import STEPS, measure
from tests.simulated.virtual_time import virtual

PACE = Pace.of(1, 1)


def blocks():
    return lambda row: threading.Event().wait()


def raises():
    def sink(row):
        raise ZeroDivisionError("in an observer")

    return sink


def never_starts():
    raise ConnectionError("no such host")


def full_disk():
    return Jsonl(Path("/dev/full"))


class Failing:
    """Raises at the rows of these steps."""

    def __init__(self, *steps: int):
        self._steps = steps

    def __call__(self, row):
        if row["step"] in self._steps:
            raise OSError("for a moment")


@pytest.fixture
def quick_end(monkeypatch):
    monkeypatch.setattr(metrics, "CLOSE_S", 0.2)


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (blocks, STEPS),
        (raises, STEPS),
        (never_starts, STEPS),
        (full_disk, STEPS),
        (lambda: Failing(3, 7), 2),
    ],
)
def test_an_observer_moves_the_step_time_by_less_than_a_hundredth_and_its_lost_rows_are_counted(
    quick_end, make, lost
):
    rows, spent = [], []
    with observed({"bad": make, "good": lambda: rows.append}) as (bad, good):

        def both(row):
            started = time.perf_counter()
            bad(row)
            good(row)
            spent.append(time.perf_counter() - started)

        found = virtual(measure(PACE, bound=4, sinks=[both]))
    assert found["steps"] == STEPS and found["scored_dropped"] == 0
    # of a step, all that the driver's thread has to do with them
    assert statistics.median(spent) < 0.01 * LONGEST_S
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (bad.lost, good.lost) == (lost, 0)


def test_a_stdout_that_nobody_reads_loses_the_lines_of_the_console_and_nothing_else(
    quick_end, monkeypatch
):
    unread, out = os.pipe()
    with os.fdopen(unread, "rb") as reader, os.fdopen(out, "w") as stdout:
        os.set_blocking(out, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(out, b"." * 4096)
        os.set_blocking(out, True)
        monkeypatch.setattr(sys, "stdout", stdout)
        printed = dict(
            accuracy=None, kl=0.0, loss=0.0, lag_mean=0.0
        )  # of the columns, what simulated roles do not measure
        with observed({"console": lambda: Lines(STEPS, every_s=0)}) as (console,):
            found = virtual(measure(PACE, bound=4, sinks=[lambda row: console(printed | row)]))
        lost = console.lost
        # what still waits to be printed finds no reader, and not the stdout of the next test
        reader.close()
        console.join(30)
    assert found["steps"] == STEPS
    assert lost == STEPS


PRINTS = """
import sys
from async_opd.core import printing as say
from async_opd.telemetry import metrics
from async_opd.telemetry.console.lines import Lines
metrics.CLOSE_S = say.SAY_S = 0.3
row = {key: 1 for _, key, _, _ in Lines.COLUMNS} | {"step": 1}
with metrics.observed({"console": lambda: Lines(1, every_s=0)}) as (console,):
    for _ in range(1000):
        console(row)
say.say("the end")
print(console.lost, file=sys.stderr)
"""


@pytest.mark.parametrize("reader", ["sleeps", "is gone", "is a full disk"])
def test_a_process_whose_stdout_takes_nothing_still_ends_well(reader):
    unread, out = os.pipe()
    if reader == "is a full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), out)
    if reader == "is gone":
        os.close(unread)
    ended = subprocess.run(
        [sys.executable, "-c", PRINTS],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=90,
        check=False,
    )
    os.close(out)
    *said, lost = ended.stderr.splitlines()
    assert ended.returncode == 0, ended.stderr
    errors = {"is gone": ["observer console: BrokenPipeError: [Errno 32] Broken pipe"]}
    errors["is a full disk"] = ["observer console: OSError: [Errno 28] No space left on device"]
    assert said == errors.get(reader, [])
    # a pipe holds some hundred lines
    assert int(lost) == 1000 if reader != "sleeps" else 0 < int(lost) < 1000
