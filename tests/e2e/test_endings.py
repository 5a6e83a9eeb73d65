"""Two synchronous runs repeat each other, and what ends a run ends it by name with nothing left of
it."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.conftest import Job, demo, rows, wait_for_steps

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
LONG = "run.steps=100000"
STEPS = 4  # that are compared


class Ended(NamedTuple):
    """What is left of a job."""

    status: int
    log: str
    processes: list[str]
    rows: list[dict]


def ended(folder: Path, end: Callable[[Job], None]) -> Ended:
    """Of a job that trained, step after step on policy, until `end`."""
    never = "run.checkpoint_every_steps=0", "run.checkpoint_minutes=0", "run.max_restarts=0"
    job = demo(folder, LONG, *never, "run.max_lag_steps=0", "sync.parity_every_steps=1")
    wait_for_steps(job, folder / "run", STEPS)
    end(job)
    status = job.wait(60)
    return Ended(status, job.text(), job.gone_within(60), rows(folder / "run"))


@pytest.fixture(scope="module")
def learner_killed(tmp_path_factory) -> Ended:
    return ended(
        tmp_path_factory.mktemp("learner"), lambda job: job.titled("ray::Learner")[0].kill()
    )


@pytest.fixture(scope="module")
def interrupted_twice(tmp_path_factory) -> Ended:
    def interrupt(job: Job) -> None:
        os.killpg(job.process.pid, signal.SIGINT)
        time.sleep(0.05)
        os.killpg(job.process.pid, signal.SIGINT)

    return ended(tmp_path_factory.mktemp("interrupted"), interrupt)


def test_a_killed_learner_ends_a_run_that_has_no_restart_left_by_name(learner_killed):
    assert learner_killed.status == 1
    named = r"^async-opd: ActorLost: .*\(at version \d+\) \(not saved"
    assert re.search(named, learner_killed.log, re.MULTILINE), learner_killed.log
    assert "Traceback" not in learner_killed.log
    assert learner_killed.processes == []


def test_control_c_twice_ends_the_run_at_once(interrupted_twice):
    assert interrupted_twice.status == 130
    assert interrupted_twice.processes == []


def test_a_synchronous_run_is_on_policy_and_repeats_itself(learner_killed, interrupted_twice):
    curves, sampled = [], []
    for found in (learner_killed.rows[:STEPS], interrupted_twice.rows[:STEPS]):
        assert [row["lag_max"] for row in found] == [0] * STEPS
        assert max(row["log_ratio_fresh_max"] for row in found) < 1e-3  # engine mismatch alone
        assert max(row["parity_gap"] for row in found) < 1e-4
        assert {row["tokens_excluded"] for row in found} == {0}
        curves.append([row["loss"] for row in found])
        sampled.append([(row["tokens"], row["accuracy"]) for row in found])
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert len(set(curves[0])) == STEPS  # it did learn something
    assert sampled[0] == sampled[1]  # token for token


def test_weights_that_blow_up_end_the_run_by_name(tmp_path):
    job = demo(tmp_path, LONG, "learner.weight_decay=1e38", "learner.lr=0.9")
    assert job.wait(240) == 1
    named = "^async-opd: (Diverged|WireError|ParityError|TooManyDropped): "
    assert re.search(named, job.text(), re.MULTILINE), job.text()
    assert job.gone_within(60) == []
