import asyncio
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
from async_opd.cli.train import to_resume
from async_opd.config.load import load, load_run
from async_opd.core.errors import ActorLost, AsyncOpdError, DataError
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SPANS
from async_opd.core.vocabulary import Tokens
from async_opd.driver import resize
from async_opd.driver.checkpoints import find
from async_opd.launch import run as runs
from async_opd.tools.audit.books import audit
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


async def test_a_restart_and_a_resume_begin_with_the_sizes_that_scale_asked_for(
    tmp_path, over_simulated_roles, monkeypatch
):
    run_dir, begun = tmp_path / "run", []
    monkeypatch.setattr(resize, "POLL_S", 0.02)

    class Learner(SimulatedLearner):
        """Is lost at step 6 of its first life, and waits at step 4 until the pools have grown."""

        async def step(self, groups):
            if self.version == 3 and len(begun) == 1:
                words = resize.parse(["generators=3", "teacher=2"])
                await asyncio.to_thread(resize.ask, run_dir, words, 60.0)
            if self.version == 5 and len(begun) == 1:
                raise ActorLost("learner rank 0 died")
            return await super().step(groups)

    class Cluster(SimulatedCluster):
        async def roles(self):
            config = self._config
            begun.append((config.rollout.generators, config.teacher.replicas))
            return Roles(
                generators=[SimulatedGenerator() for _ in range(config.rollout.generators)],
                teachers={"": [SimulatedTeacher() for _ in range(config.teacher.replicas)]},
                verifier=SimulatedVerifier(),
                learner=Learner(max_lag_steps=config.run.max_lag_steps),
                spawn=self._spawn,
            )

        async def _spawn(self, name, index):
            return SimulatedGenerator() if name == "generator" else SimulatedTeacher()

    monkeypatch.setattr(runs, "Cluster", Cluster)
    settings = [f"run.dir={run_dir}", "run.checkpoint_every_steps=2", *SMALL]
    summary = await runs.run(load(DEMO, settings))
    assert summary["restarts"] == 1 and begun == [(1, 1), (3, 2)]
    await runs.run(load_run(run_dir, ["run.steps=14"]), find(run_dir))
    await runs.run(load_run(run_dir, ["run.steps=16", "rollout.generators=2"]), find(run_dir))
    assert begun[2:] == [(3, 2), (2, 2)]  # what is asked for last holds
    assert audit(run_dir).discrepancies == []


async def test_going_back_leaves_a_whole_run_aside_that_can_itself_be_gone_on_with(
    tmp_path, over_simulated_roles
):
    run_dir = tmp_path / "run"
    asked = [f"run.dir={run_dir}", "run.checkpoint_every_steps=4", *SMALL]
    await runs.run(load(DEMO, asked))
    before = {name: (run_dir / name).read_bytes() for name in ("metrics.jsonl", "summary.json")}
    for number, lr in ((1, "1e-4"), (2, "1e-5")):
        config = load_run(run_dir, [f"learner.lr={lr}"])
        await runs.run(config, find(run_dir / "checkpoints" / "000004"))
        aside = run_dir / "set-aside" / f"{number}"
        assert [path.name for path in sorted((aside / "checkpoints").iterdir())] == [
            "000008",
            "000012",
        ]
        assert audit(aside).discrepancies == [] and audit(aside).finished
        assert audit(run_dir).discrepancies == [] and audit(run_dir).finished
        events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
        said = [event["why"] for event in events if event["what"] == "set aside"]
        assert said[-1] == f"all that lay behind step 4: {aside}" and len(said) == number
    first, second = (run_dir / "set-aside" / n for n in "12")
    assert {name: (first / name).read_bytes() for name in before} == before
    lr = [load_run(folder).learner.lr for folder in (first, second, run_dir)]
    assert lr == [load(DEMO, asked).learner.lr, 1e-4, 1e-5]  # as each of them was trained
    config, checkpoint = to_resume(first, ["run.steps=14"])
    await runs.run(config, checkpoint)
    assert audit(first).discrepancies == [] and audit(first).steps == 14


async def test_rows_behind_the_newest_checkpoint_are_set_aside_once(tmp_path, over_simulated_roles):
    run_dir = tmp_path / "run"
    await runs.run(load(DEMO, [f"run.dir={run_dir}", *SMALL]))
    with (run_dir / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 13, "loss": NaN}\n{"step": 14}\n{"st')
    await runs.run(load_run(run_dir, ["run.steps=14"]), find(run_dir))
    (aside,) = (run_dir / "set-aside").iterdir()
    assert (aside / "metrics.jsonl").read_text() == '{"step": 13, "loss": NaN}\n{"step": 14}\n{"st'
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "summary.json"]
    assert audit(run_dir).discrepancies == []


async def test_events_are_of_the_step_that_a_run_goes_on_behind(tmp_path, over_simulated_roles):
    config = load(DEMO, [f"run.dir={tmp_path / 'run'}", *SMALL])
    await runs.run(config)
    await runs.run(load_run(tmp_path / "run", ["run.steps=14"]), find(tmp_path / "run"))
    rows = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [(event["what"], event["step"]) for event in map(json.loads, rows)]
    assert events == [("placed", 0), ("saved", 12), ("placed", 12), ("saved", 14)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["version"] == 14
