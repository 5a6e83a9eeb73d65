"""A cluster of three nodes, each with a raylet of its own."""

import json
import time
from pathlib import Path

import pytest

from async_opd.audit.books import audit
from tests.e2e.conftest import SMALL, Job
from tests.e2e.nodes import Nodes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
STEPS, HEAD = 60, "127.0.0.1"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def nodes_of(run: Path, member: str) -> list[str]:
    """Where a member has lived, one after the other."""
    placed = (row for row in lines(run / "events.jsonl") if row["what"] == "placed" and row["who"] == member)
    return [row["why"].removeprefix("node ") for row in placed]


def until_steps(job: Job, run: Path, count: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while len(lines(run / "metrics.jsonl")) < count:
        assert job.process.poll() is None and time.monotonic() < deadline, job.text()
        time.sleep(0.2)


def test_a_submitted_run_spreads_over_three_nodes_and_survives_the_loss_of_one(tmp_path):
    cluster, run = Nodes(3, tmp_path), tmp_path / "run"
    job = cluster.submit("-m", "async_opd", "demo", f"run.dir={run}", f"run.steps={STEPS}", *SMALL)
    until_steps(job, run, 5, within_s=150)
    learner, generator, teacher = (nodes_of(run, f"{role} 0") for role in ("learner rank", "generator", "teacher"))
    assert learner == [HEAD]
    assert len({*learner, *generator, *teacher}) == 3

    cluster.kill(generator[0])
    before = len(lines(run / "metrics.jsonl"))
    assert before < STEPS / 2
    assert job.wait(150) == 0, job.text()
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert generator[0] not in nodes_of(run, "generator 0")[1:] != []
    told = [(row["what"], row["who"]) for row in lines(run / "events.jsonl")]
    assert ("lost", "generator 0") in told and ("serves", "generator 0") in told
    assert ("starts again", "run") not in told  # nothing but what was there was lost
    books = audit(run)
    assert books.discrepancies == [] and books.finished
    assert cluster.stop() == []
