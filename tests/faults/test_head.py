"""Real jobs that lose Ray's head."""

import signal
import time

import pytest

from async_opd.driver import checkpoints
from tests.faults.harness import Hurt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NOTICED_S = 2 + 20  # timeout.health_s, and at most nodes.GIVE_UP_S


@pytest.mark.parametrize(
    ("part", "how", "why"),
    [
        # every actor, which dies with its raylet, and every engine with its actor
        ("raylet", signal.SIGKILL, "raylet died"),
        # the actors live on: what is trained is saved
        ("gcs_server", signal.SIGSTOP, "no answer for"),
    ],
)
def test_a_run_ends_by_name_when_rays_head_is_lost_and_nothing_is_left(tmp_path, part, how, why):
    hurt = Hurt(tmp_path, "run.checkpoint_every_steps=1000")
    hurt.trains(2)
    steps = hurt.steps()
    began = hurt.hurt_head(part, how)
    assert hurt.job.wait(120) == 1, hurt.job.text()
    # to notice it, to save, and to leave Ray
    assert time.time() - began < NOTICED_S + 18 + 10 + 20
    assert f"async-opd: HeadLost: Ray's head: {why}" in hurt.job.text()
    assert "Traceback" not in hurt.job.text()
    assert hurt.job.gone_within(30) == []
    if part == "gcs_server":
        assert checkpoints.find(hurt.run_dir).state.version >= steps
    hurt.books()
