"""A run as a job of a Ray cluster of this machine, by the commands a user types."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from async_opd.checkpoints import find
from tests.e2e.conftest import SMALL, Job
from tests.e2e.nodes import Nodes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_submitted_run_is_left_followed_scaled_and_stopped_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # as in an activated environment
    cluster, run = Nodes(1, tmp_path), tmp_path / "run"
    at = "--address", cluster.api

    def says(*args: str, status: int = 0) -> str:
        job = Job(*args, *at, folder=tmp_path, env={"HOME": str(tmp_path)})
        assert job.wait(60) == status, job.text()
        return job.text()

    settings = [f"run.dir={run}", "run.steps=100000", *SMALL]
    submitting = Job("submit", "configs/demo.toml", *settings, *at, folder=tmp_path, env={"HOME": str(tmp_path)})
    submitting.until("1/100000 ")
    id = next(line for line in submitting.text().splitlines() if line.startswith("raysubmit_"))
    submitting.process.send_signal(signal.SIGINT)
    assert submitting.wait(30) == 130
    assert f"left {id}, which goes on" in submitting.text()

    following = Job("logs", id, "--follow", *at, folder=tmp_path, env={"HOME": str(tmp_path)})
    assert f"{id}  RUNNING" in says("status")
    assert says("scale", id, "teacher=2") == "teacher: 1 -> 2\n"

    assert f"async-opd submit --resume {run} --address {cluster.api}" in says("stop", id)
    assert following.wait(30) == 130
    assert "interrupted; what was trained is in the newest checkpoint" in following.text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert find(run).state.version == steps[-1]  # every step that was made
    assert "1/100000 " in following.text()
    assert cluster.stop() == []
