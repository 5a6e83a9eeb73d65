import atexit
import gc
import json
import logging
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from async_opd import toy
from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load, load_run
from async_opd.core.errors import ActorLost, AsyncOpdError, DataError
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SPANS
from async_opd.core.vocabulary import Tokens
from async_opd.driver.checkpoints import find
from async_opd.launch import run as runs
from async_opd.tools.trace.read import recorded
from async_opd.toy.tokenizer import build_tokenizer
from tests.simulated.roles import (
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)


def test_an_earlier_run_directory_is_kept_beside_the_new_one(tmp_path):
    for _ in range(3):
        with runs.new_dir(tmp_path / "run") as made:
            made.joinpath("mine").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "mine").exists() for p in tmp_path.iterdir())


def left_by(path, error: AsyncOpdError, *files: str) -> list[str]:
    """What is under the grandparent of `path` when a run there has written `files` and ended with
    `error`."""
    with pytest.raises(type(error)), runs.new_dir(path) as made:
        for file in ("config.json", *files):
            made.joinpath(file).touch()
        raise error
    return sorted(str(p.relative_to(path.parent.parent)) for p in path.parent.parent.rglob("*"))


def test_a_mistake_found_before_the_first_prompt_leaves_everything_as_it_was(tmp_path):
    assert left_by(tmp_path / "runs" / "a", DataError("no such column")) == []
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "mine").touch()
    assert left_by(tmp_path / "runs" / "a", DataError("no such column")) == [
        "runs",
        "runs/a",
        "runs/a/mine",
    ]


def test_a_run_that_failed_or_had_begun_keeps_its_directory(tmp_path):
    lost = left_by(tmp_path / "runs" / "a", ActorLost("teacher 0"))
    assert lost == ["runs", "runs/a", "runs/a/config.json"]
    begun = left_by(tmp_path / "runs" / "b", DataError("row 7"), "ledger.jsonl")
    assert begun == [*lost, "runs/b", "runs/b/config.json", "runs/b/ledger.jsonl"]


class SimulatedCluster:
    """In place of Ray's: roles that answer at once."""

    def __init__(self, config, emit, **_):
        self._config, self._emit = config, emit

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    async def roles(self):
        self._emit("placed", "learner", "")
        learner = SimulatedLearner(max_lag_steps=self._config.run.max_lag_steps)
        return Roles(
            generators=[SimulatedGenerator()],
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
            learner=learner,
        )


@pytest.fixture
def over_simulated_roles(monkeypatch):
    """Runs are over simulated roles and made prompts."""

    def inputs(config):
        prompts = Prompts()
        prompts.counts, prompts.left_out_words = {}, ""
        prompts.close = lambda: None
        return SimpleNamespace(
            prompts=prompts,
            held_out=[],
            tokens=Tokens(student=((0, 24),), eos_ids=(1,)),
            tokenizer=build_tokenizer(),
        )

    monkeypatch.setattr(runs, "Cluster", SimulatedCluster)
    monkeypatch.setitem(sys.modules, "async_opd.launch.inputs", SimpleNamespace(read=inputs))
    yield
    gc.freeze()  # again, what was imported for the tests


SMALL = ("run.steps=12", "learner.trajectories_per_step=4", "teacher.evaluate=false")


@pytest.mark.parametrize(("kept", "recorded_steps"), [(50, [None, *range(1, 13), None]), (0, None)])
async def test_a_run_leaves_the_spans_of_its_last_steps_if_any_are_to_be_kept(
    tmp_path, over_simulated_roles, kept, recorded_steps
):
    summary = await runs.run(
        load(DEMO, [f"run.dir={tmp_path / 'run'}", f"run.trace_steps={kept}", *SMALL])
    )
    assert summary["steps"] == summary["version"] == 12
    assert (tmp_path / "run" / SPANS).exists() == (recorded_steps is not None)
    if recorded_steps:
        assert [line.step for line in recorded(tmp_path / "run").lines] == recorded_steps


def process_wide() -> dict:
    """What a run could leave changed in the process of who called it."""
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "frozen": gc.get_freeze_count(),
        "called at exit": atexit._ncallbacks(),
        "environment": dict(os.environ),
        "log levels": {
            name: logging.getLogger(name).level
            for name in ("", "ray", "datasets", "huggingface_hub")
        },
    }


@pytest.mark.parametrize("ends", ["well", "badly"])
async def test_a_run_leaves_the_process_as_it_was(
    ends, tmp_path, over_simulated_roles, monkeypatch
):
    meanwhile = []

    async def train(*args):
        meanwhile.append(process_wide())
        if ends == "badly":
            raise ActorLost("teacher 0")
        return {}

    monkeypatch.setattr(runs, "train", train)
    gc.unfreeze()  # what was imported for the tests: a user's process has nothing frozen
    before = process_wide()
    with pytest.raises(ActorLost) if ends == "badly" else nullcontext():
        await runs.run(load(DEMO, [f"run.dir={tmp_path / 'run'}", *SMALL]))
    assert process_wide() == before
    assert meanwhile[0]["signals"] != before["signals"] and meanwhile[0]["frozen"] > 10_000


async def test_a_run_can_be_gone_on_with_where_another_copy_of_the_package_is(
    tmp_path, over_simulated_roles, monkeypatch
):
    job = tmp_path / "job"  # which unpacks the package, and is gone with it
    shutil.copytree(toy.WEIGHTS, job / "weights")
    with monkeypatch.context() as there:
        there.setattr(toy, "WEIGHTS", job / "weights")
        await runs.run(load(DEMO, [f"run.dir={tmp_path / 'run'}", *SMALL]))
    shutil.rmtree(job)
    (tmp_path / "run").rename(tmp_path / "moved")
    config = runs.resolve_toy(load_run(tmp_path / "moved"), tmp_path / "moved")
    assert config.student.model == str(toy.STUDENT)
    assert config.data.path == str(tmp_path / "moved" / "data" / "train.jsonl")
    assert all(Path(file).exists() for file in config.inputs.values())


async def test_events_are_of_the_step_that_a_run_goes_on_behind(tmp_path, over_simulated_roles):
    config = load(DEMO, [f"run.dir={tmp_path / 'run'}", *SMALL])
    await runs.run(config)
    await runs.run(load_run(tmp_path / "run", ["run.steps=14"]), find(tmp_path / "run"))
    rows = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [(event["what"], event["step"]) for event in map(json.loads, rows)]
    assert events == [("placed", 0), ("saved", 12), ("placed", 12), ("saved", 14)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["version"] == 14
