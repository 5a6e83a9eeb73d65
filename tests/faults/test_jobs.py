"""Real jobs that lose their members: each is hurt several times, for a start costs half a
minute."""

import json
import subprocess
import sys
import time

import pytest

from async_opd.driver import checkpoints
from tests.e2e.conftest import rows
from tests.faults.harness import Hurt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
# a loss is noticed by itself, not by a silence
PATIENT = ("timeout.stall_s=600", "sync.timeout_s=10")


def test_generators_die_and_are_scaled_and_no_prompt_is_lost(tmp_path):
    hurt = Hurt(tmp_path, "rollout.generators=3", *PATIENT)
    hurt.trains(2)

    first = hurt.hurt("generator", which=1)
    hurt.told("lost", "generator", first)
    hurt.trains(2)  # by the others

    stopped = hurt.pids("generator")[0]
    stopped.suspend()  # the next broadcast waits for it …
    time.sleep(2)
    second = time.time()
    stopped.kill()  # … and breaks off
    hurt.told("lost", "generator", second)
    hurt.trains(2)  # by the one that is left, until the others are replaced
    hurt.told("serves", "generator", first)
    hurt.trains(3)

    scaled = [sys.executable, "-m", "async_opd", "scale", str(hurt.run_dir)]
    answer = subprocess.run(
        [*scaled, "generators=1"], capture_output=True, text=True, timeout=120, check=True
    )
    assert answer.stdout == "generators: 3 -> 1\n"
    # one that was on its way to a place that is gone leaves once it is there
    hurt.job.until(lambda: len(hurt.pids("generator")) <= 1)
    hurt.trains(3)
    assert len(hurt.pids("generator")) == 1

    hurt.interrupt()
    assert json.loads((hurt.run_dir / "checkpoint" / "config.json").read_text())["vocab_size"] == 24
    books = hurt.books()
    assert sum(books.returned.values()) > 0  # what the lost ones had went to others
    assert books.dropped == {}
    assert hurt.job.gone_within(60) == []
    steps = rows(hurt.run_dir)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert max(row["lag_max"] for row in steps) <= 4
    gaps = [row["parity_gap"] for row in steps if row["parity_gap"] is not None]
    assert max(gaps, default=0) < 1e-4


def test_teachers_and_the_verifier_die_and_the_learner_starts_again_from_its_checkpoint(tmp_path):
    hurt = Hurt(
        tmp_path, "teacher.replicas=2", "run.checkpoint_every_steps=3", "run.max_restarts=1"
    )
    hurt.trains(2)

    at = hurt.hurt("teacher", which=0)
    hurt.told("lost", "teacher", at)
    hurt.trains(2)  # by the other
    hurt.told("serves", "teacher", at)

    at = hurt.hurt("verifier")
    hurt.told("lost", "verifier", at)
    hurt.told("serves", "verifier", at)
    hurt.trains(3)

    at = hurt.hurt("learner")
    hurt.told("starts again", "run", at)
    hurt.trains(3)
    steps = hurt.steps()

    hurt.job.process.kill()  # the driver this time
    hurt.job.wait(60)
    assert hurt.job.gone_within(60) == []
    saved = checkpoints.find(hurt.run_dir).state.version
    assert saved > steps - 4
    hurt.resume(tmp_path, f"run.steps={saved + 4}", "learner.warmup_steps=0")
    assert hurt.job.wait(240) == 0, hurt.job.text()
    books = hurt.books()
    assert (books.steps, books.finished, books.outstanding) == (saved + 4, True, [])
    assert len(books.resumed_at) == 2
    assert books.dropped.keys() <= {"no step left"}  # it was to have 100,000 steps
    assert hurt.job.gone_within(60) == []
