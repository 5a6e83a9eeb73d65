"""Minutes of trouble: `make soak`."""

import random
import signal
import time

import pytest

from tests.faults.harness import Hurt

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(1800)]
MINUTES_S = 300.0
# generators are more
ROLES = ("generator", "generator", "teacher", "verifier", "learner", "driver")


def test_a_random_killer_over_all_roles_costs_neither_a_step_nor_a_prompt(tmp_path):
    draw, kills = random.Random(0), []
    settings = (
        "rollout.generators=2",
        "teacher.replicas=2",
        "run.checkpoint_every_steps=5",
        "run.max_restarts=100",
    )
    hurt = Hurt(tmp_path, *settings)
    hurt.trains(5)
    began = time.monotonic()
    while time.monotonic() < began + MINUTES_S or len(kills) < 10:
        role = draw.choice(ROLES)
        if role == "driver":
            hurt.job.process.kill()
            hurt.job.wait(60)
            assert hurt.job.gone_within(60) == []
            hurt.resume(tmp_path)
        else:
            hurt.hurt(role, which=draw.randrange(len(hurt.pids(role))))
        kills.append((role, hurt.steps()))
        hurt.trains(2)  # it has recovered
        time.sleep(draw.uniform(0, 5))
    hurt.interrupt()
    hurt.resume(tmp_path, f"run.steps={hurt.books().steps + 3}", "learner.warmup_steps=0")
    assert hurt.job.wait(300) == 0, hurt.job.text()
    books = hurt.books()
    print(f"{len(kills)} kills and recoveries: {kills}")
    assert len(kills) >= 10
    assert books.finished and books.outstanding == [] and books.dropped.keys() <= {"no step left"}


def test_the_only_teacher_is_killed_and_waited_for(tmp_path):
    hurt = Hurt(tmp_path)
    hurt.trains(2)
    at = hurt.hurt("teacher")
    hurt.told("none left", "teacher", at)
    hurt.told("serves", "teacher", at)
    hurt.trains(3)
    hurt.interrupt()
    assert sum(hurt.books().dropped.values()) == 0


def test_a_generator_that_is_stopped_for_a_minute_is_replaced(tmp_path):
    hurt = Hurt(tmp_path, "rollout.generators=2", "sync.timeout_s=10", "timeout.stall_s=15")
    hurt.trains(2)
    process = hurt.pids("generator")[0]
    at = hurt.hurt("generator", signal.SIGSTOP)
    hurt.told("lost", "generator", at)
    time.sleep(max(at + 60 - time.time(), 0))
    assert not process.is_running()
    hurt.told("serves", "generator", at)
    hurt.trains(3)
    hurt.interrupt()
    assert sum(hurt.books().dropped.values()) == 0
