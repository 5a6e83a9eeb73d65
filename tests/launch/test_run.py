import asyncio
import atexit
import gc
import json
import logging
import os
import shutil
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from async_opd import toy
from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.train import to_resume
from async_opd.config.evaluation import EvalRun
from async_opd.config.load import load, load_run
from async_opd.config.sections import StudentConfig
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CheckpointError,
    ConfigError,
    DataError,
    RunInUse,
)
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SPANS, holds_run
from async_opd.core.run_lock import locked
from async_opd.core.vocabulary import Tokens
from async_opd.driver import resize
from async_opd.driver.checkpoints import Checkpoint, RunState, find
from async_opd.launch import run as runs
from async_opd.launch.new_run import new_dir
from async_opd.roles.rollout.config import DataConfig
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


def made(path: Path, work: str = "train") -> AbstractContextManager[Path]:
    return new_dir(path, load(DEMO, [f"run.dir={path}"]), work)


def test_an_earlier_run_directory_is_kept_beside_the_new_one(tmp_path):
    for _ in range(3):
        with made(tmp_path / "run") as run:
            assert holds_run(run)  # from its first moment on
            run.joinpath("mine").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert all((p / "mine").exists() for p in tmp_path.iterdir())


EVALUATION = EvalRun(student=StudentConfig(model="a"), data=DataConfig(path="b"))


@pytest.mark.parametrize("first", ["train", "train --resume", "eval"])
@pytest.mark.parametrize("second", ["train", "train --resume", "eval"])
def test_one_at_a_time_works_in_a_directory_and_the_second_moves_nothing(first, second, tmp_path):
    def at_work(work: str) -> AbstractContextManager:
        asked = EVALUATION if work == "eval" else load(DEMO)
        run = tmp_path / "run"
        return locked(run, work) if work == "train --resume" else new_dir(run, asked, work)

    with made(tmp_path / "run"):
        pass
    with at_work(first):
        (tmp_path / "run" / "mine").touch()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RunInUse, match=f"^{tmp_path}/run: {first} works in it"):
            at_work(second).__enter__()
        assert sorted(tmp_path.rglob("*")) == before
    with at_work(second):
        pass


HOLDINGS = {
    "runs": "a/config.json",
    "a model": "config.json",
    "no JSON": "config.json",
    "documents": "thesis.tex",
    "a hidden file": ".keep",
    "no object": "config.json",
}


@pytest.mark.parametrize("kind", HOLDINGS)
def test_what_no_run_of_ours_has_made_is_never_moved(kind, tmp_path):
    file = tmp_path / "shared" / HOLDINGS[kind]
    file.parent.mkdir(parents=True)
    content = {"a model": '{"model_type": "qwen3"}', "no JSON": "{", "no object": "[]"}
    file.write_text(content.get(kind, "{}"))
    before = sorted(tmp_path.rglob("*"))
    inside = HOLDINGS[kind].split("/")[0]
    with pytest.raises(ConfigError, match=f"shared': holds {inside}, and no config.json of a run"):
        made(tmp_path / "shared").__enter__()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("left", [[], ["lock.json"], ["lock.json", ".config.json.partial"]])
def test_an_empty_folder_is_used_and_left_empty_by_a_mistake(left, tmp_path):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert left_by(tmp_path / "run", DataError("no such column"), under=tmp_path) == ["run"]
    with made(tmp_path / "run"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_the_runs_are_where_it_leads_to(there, tmp_path):
    large, link = tmp_path / "large" / "run", tmp_path / "run"
    if there:
        large.mkdir(parents=True)
    link.symlink_to(large)
    assert left_by(link, DataError("no such column"), under=tmp_path / "large") == ["run"] * there
    for _ in range(2):
        with made(link) as run:
            run.joinpath("mine").touch()
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["large", "run"]
    assert sorted(p.name for p in large.parent.iterdir()) == ["run", "run.1"]


@pytest.mark.parametrize("name", ["checkpoints/000007", "checkpoints", "set-aside/1", "link/new"])
def test_nothing_is_made_among_what_another_run_keeps(name, tmp_path):
    with made(tmp_path / "run") as run:
        (run / "set-aside" / "1").mkdir(parents=True)
        (run / "link").symlink_to("set-aside")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"run.dir = '{run}/{name}': lies in {run}/"):
        made(run / name).__enter__()
    assert sorted(tmp_path.rglob("*")) == before
    with made(run / "eval", "eval"):  # beside it there is room
        pass


def test_a_run_is_not_moved_while_another_inside_it_is_gone_on_with(tmp_path):
    inner = tmp_path / "run" / "set-aside" / "1"
    with made(tmp_path / "run"):
        pass
    shutil.copytree(tmp_path / "run", inner)
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "lock.json").write_text("another's")
    with locked(inner, "train --resume"):
        with pytest.raises(RunInUse, match=f"^{inner}: train --resume works in it"):
            made(tmp_path / "run").__enter__()
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with made(tmp_path / "run"), locked(tmp_path / "run.1" / "set-aside" / "1", "train --resume"):
        assert (tmp_path / "run.1" / "data" / "lock.json").read_text() == "another's"


@pytest.mark.parametrize("written", [[], [".config.json.partial"]])
def test_a_run_that_begins_at_the_same_moment_is_at_work(written, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", "train"):
        for name in written:
            (tmp_path / "run" / name).touch()
        with pytest.raises(RunInUse, match="train works in it"):
            made(tmp_path / "run").__enter__()


def left_by(path, error: AsyncOpdError, *files: str, under: Path | None = None) -> list[str]:
    """What is `under` the grandparent of `path`, or a folder, when a run there has written `files`
    and ended with `error`."""
    with pytest.raises(type(error)), made(path) as run:
        for file in files:
            run.joinpath(file).touch()
        raise error
    under = under or path.parent.parent
    return sorted(str(p.relative_to(under)) for p in under.rglob("*"))


def test_a_mistake_found_before_the_first_prompt_leaves_everything_as_it_was(tmp_path):
    run = tmp_path / "runs" / "a"
    assert left_by(run, DataError("no such column")) == []
    with made(run):
        (run / "mine").touch()
    whole = ["runs", "runs/a", "runs/a/config.json", "runs/a/lock.json", "runs/a/mine"]
    assert left_by(run, DataError("no such column")) == whole


def test_a_mistake_says_what_it_could_not_put_back(tmp_path, monkeypatch):
    run = tmp_path / "a"
    with made(run):
        pass
    with pytest.raises(DataError) as raised, made(run):
        (tmp_path / "a.1").rename(tmp_path / "a.2")
        raise DataError("no such column")
    assert raised.value.__notes__ == [
        f"not removed: {run}.1: No such file or directory; the earlier run is in {run}.1"
    ]


def test_a_run_that_failed_or_had_begun_keeps_its_directory(tmp_path):
    lost = left_by(tmp_path / "runs" / "a", ActorLost("teacher 0"))
    assert lost == ["runs", "runs/a", "runs/a/config.json", "runs/a/lock.json"]
    for name, begun in (("b", "ledger.jsonl"), ("c", "problems.jsonl")):
        assert f"runs/{name}/{begun}" in left_by(
            tmp_path / "runs" / name, DataError("row 7"), begun
        )


class SimulatedCluster:
    """In place of Ray's: roles that answer at once."""

    gpus = False

    def __init__(self, config, emit, **_):
        self.config, self._emit = config, emit

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    async def roles(self):
        self._emit("placed", "learner", "")
        learner = SimulatedLearner(max_lag_steps=self.config.run.max_lag_steps)
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
            templates={},
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
            config = self.config
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


async def test_a_run_and_a_resume_hold_their_directory_through_restarts(
    tmp_path, over_simulated_roles, monkeypatch
):
    place, trains, worked = f"run.dir={tmp_path / 'run'}", runs.train, []

    async def train(*args):
        for another in ([], ["from its checkpoint"]) if worked else ([],):
            config = load_run(tmp_path / "run") if another else load(DEMO, [place, *SMALL])
            with pytest.raises(RunInUse, match=f"{working} works in it"):
                await runs.run(config, find(tmp_path / "run") if another else None)
        worked.append(working)
        summary = await trains(*args)
        if len(worked) == 2:
            raise ActorLost("teacher 0")
        return summary

    monkeypatch.setattr(runs, "train", train)
    working = "train"
    await runs.run(load(DEMO, [place, *SMALL]))
    working = "train --resume"
    await runs.run(load_run(tmp_path / "run", ["run.steps=14"]), find(tmp_path / "run"))
    assert worked == ["train", *2 * ["train --resume"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


async def test_a_checkpoint_that_says_nothing_of_its_prompts_is_named_before_anything_starts(
    tmp_path,
):
    with made(tmp_path / "run") as run:
        pass
    config = load_run(run, ["run.steps=9", "learner.warmup_steps=0"])
    state = RunState(version=6, position={}, outstanding=[])
    with pytest.raises(CheckpointError, match=f"^{run}/6: the position of its prompts: KeyError"):
        await runs.run(config, Checkpoint(run / "6", state))
