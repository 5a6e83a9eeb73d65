"""What ends a run ends it by name within seconds, and nothing of it is left."""

import os
import re
import signal
import time

import pytest

from tests.e2e.conftest import Job, demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
LONG = "run.steps=100000"


def training(tmp_path, *overrides: str) -> Job:
    """A job in the middle of training."""
    job = demo(tmp_path, LONG, *overrides)
    job.until("train tok/s")
    time.sleep(3)
    return job


def test_without_a_checkpoint_a_killed_learner_ends_the_run_by_name_within_ten_seconds(tmp_path):
    job = training(tmp_path)
    job.find("ray::Learner").kill()
    assert job.wait(10) == 1
    assert re.search("^async-opd: ActorLost: .*not started again: .*no complete checkpoint", job.text(), re.MULTILINE)
    assert "Traceback" not in job.text()
    assert job.gone_within(10) == []


def test_control_c_twice_ends_the_run_in_five_seconds(tmp_path):
    job = training(tmp_path)
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait(5)
    assert job.gone_within(20) == []


def test_weights_that_blow_up_end_the_run_by_name(tmp_path):
    job = demo(tmp_path, LONG, "learner.weight_decay=1e38", "learner.lr=0.9")
    assert job.wait(150) == 1
    assert re.search("^async-opd: (Diverged|WireError|ParityError): ", job.text(), re.MULTILINE), job.text()
    assert job.gone_within(20) == []
