"""A run as a job of a Ray cluster of three nodes, by the commands a user types; one of the nodes
dies."""

import os
import signal
import sys
from pathlib import Path

import pytest

from async_opd.driver.checkpoints import find
from async_opd.tools.audit.books import audit
from tests.e2e.conftest import SMALL, Job, events, rows, wait_for_event, wait_for_steps
from tests.e2e.nodes import Nodes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def nodes_of(run: Path, member: str) -> list[str]:
    """Where a member has lived, one after the other."""
    placed = (
        event for event in events(run) if event["what"] == "placed" and event["who"] == member
    )
    return [event["why"].removeprefix("node ") for event in placed]


def test_a_submitted_run_is_left_followed_and_scaled_survives_a_node_and_is_stopped(
    tmp_path, monkeypatch
):
    # as in an activated environment
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    cluster, run = Nodes(3, tmp_path), tmp_path / "run"
    home = {"HOME": str(tmp_path)}  # where the cluster's token is

    def start(*args: str) -> Job:
        return Job(*args, "--address", cluster.api, folder=tmp_path, env=home)

    def says(*args: str) -> str:
        job = start(*args)
        assert job.wait(120) == 0, job.text()
        return job.text()

    submitting = start("submit", "configs/demo.toml", f"run.dir={run}", "run.steps=100000", *SMALL)
    submitting.until(lambda: "1/100000 " in submitting.text())
    id = next(line for line in submitting.text().splitlines() if line.startswith("raysubmit_"))
    submitting.process.send_signal(signal.SIGINT)
    assert submitting.wait(60) == 130
    assert f"left {id}, which goes on" in submitting.text()

    following = start("logs", id, "--follow")
    assert f"{id}  RUNNING" in says("status")
    learner, generator, teacher = (
        nodes_of(run, f"{role} 0") for role in ("learner rank", "generator", "teacher")
    )
    assert learner == [cluster.head]  # beside the driver
    assert len({*learner, *generator, *teacher}) == 3

    cluster.kill(generator[0])
    wait_for_event(following, run, "lost", "generator 0")
    wait_for_event(following, run, "serves", "generator 0")
    wait_for_steps(following, run, len(rows(run)) + 3)
    assert generator[0] not in nodes_of(run, "generator 0")[1:] != []
    assert says("scale", id, "teacher=2") == "teacher: 1 -> 2\n"

    assert f"async-opd submit --resume {run} --address {cluster.api}" in says("stop", id)
    assert following.wait(60) == 130
    assert "SIGTERM; what was trained is in the newest checkpoint" in following.text()
    assert "1/100000 " in following.text()
    steps = [row["step"] for row in rows(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert find(run).state.version == steps[-1]  # every step that was made
    # nothing but what was there was lost
    assert "starts again" not in [event["what"] for event in events(run)]
    assert audit(run).discrepancies == []
    assert cluster.stop() == []
