"""Runs that are started again, over simulated roles: from where, how often, and what they leave."""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.train import to_resume
from async_opd.config.load import load
from async_opd.core.errors import ActorLost, CheckpointError, SyncFailed, SystemFailed, TimedOut
from async_opd.core.roles import Roles
from async_opd.core.vocabulary import Tokens
from async_opd.driver import set_aside
from async_opd.driver.checkpoints import committed
from async_opd.launch import restarts
from async_opd.launch import run as runs
from async_opd.tools.audit.books import audit
from async_opd.toy.tokenizer import build_tokenizer
from tests.simulated.roles import (
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)

SMALL = (
    "run.steps=6",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "teacher.evaluate=false",
)


class Learner(RecordingLearner):
    """Dies where its version is the next of `deaths`."""

    def __init__(self, deaths: list[int]):
        super().__init__()
        self._deaths = deaths

    async def step(self, groups):
        if self._deaths and self.version == self._deaths[0]:
            del self._deaths[0]
            raise ActorLost("learner rank 0 died")
        return await super().step(groups)


class Stub:
    """Runs over roles of a test."""

    def __init__(self, run_dir: Path, held_out: int = 0):
        self.run_dir, self.held_out = run_dir, held_out
        self.deaths: list[int] = []  # of the learner, by version
        self.generators = lambda: [SimulatedGenerator()]
        self.starts: list[Exception] = []  # what the starts of actors raise, one each
        self.seeds: list[int] = []
        self.learners: list[Learner] = []

    def inputs(self, config):
        prompts = Prompts()
        prompts.counts, prompts.left_out_words, prompts.close = {}, "", lambda: None
        return SimpleNamespace(
            prompts=prompts,
            held_out=list(Prompts(self.held_out)),
            tokens=Tokens(student=((0, 24),), eos_ids=(1,)),
            tokenizer=build_tokenizer(),
            templates={},
        )

    def cluster(self, config, *, first_seed, **_):
        self.seeds.append(first_seed)
        return contextlib.nullcontext(SimpleNamespace(roles=self._roles, config=config, gpus=False))

    async def _roles(self):
        if self.starts:
            raise self.starts.pop(0)
        self.learners.append(Learner(self.deaths))
        return Roles(
            generators=self.generators(),
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
            learner=self.learners[-1],
        )

    async def run(self, *overrides: str):
        return await runs.run(load(DEMO, [f"run.dir={self.run_dir}", *SMALL, *overrides]))

    def told(self, what: str) -> list[str]:
        events = map(json.loads, (self.run_dir / "events.jsonl").read_text().splitlines())
        return [event["why"] for event in events if event["what"] == what]


@pytest.fixture
def stub(tmp_path, monkeypatch):
    made = Stub(tmp_path / "run")
    monkeypatch.setattr(runs, "Cluster", made.cluster)
    monkeypatch.setattr(restarts, "WAIT_S", 0.01)
    monkeypatch.setitem(sys.modules, "async_opd.launch.inputs", SimpleNamespace(read=made.inputs))
    return made


def rows_of(run_dir: Path) -> list[int]:
    return [json.loads(row)["step"] for row in (run_dir / "metrics.jsonl").read_text().splitlines()]


async def test_a_learner_lost_before_the_first_checkpoint_starts_again_from_version_0(stub):
    stub.deaths = [3]
    summary = await stub.run()
    assert (summary["restarts"], summary["version"], summary["steps"]) == (1, 6, 6)
    first, second = stub.learners
    # the same prompts, from the start again
    assert second.trained[: len(first.trained)] == first.trained
    assert len(set(second.trained)) == 24 and stub.seeds[0] == stub.seeds[1]
    assert rows_of(stub.run_dir) == [1, 2, 3, 4, 5, 6]
    books = audit(stub.run_dir)
    assert (books.discrepancies, books.finished, books.resumed_at) == ([], True, [0])
    assert stub.told("starts again") == ["from step 0, for ActorLost: learner rank 0 died"]


async def test_a_generator_lost_in_the_evaluation_before_training_is_a_restart(stub):
    class Dies(SimulatedGenerator):
        async def respond(self, prompt, sampling):
            raise ActorLost("generator 0 died")

    kinds = [Dies, SimulatedGenerator]
    stub.held_out, stub.generators = 3, lambda: [kinds.pop(0)()]
    summary = await stub.run()
    assert (summary["restarts"], summary["accuracy_before"]) == (1, 1.0)
    assert audit(stub.run_dir).discrepancies == []


async def test_an_only_generator_that_is_lost_costs_no_step(stub):
    class Dies(SimulatedGenerator):
        async def generate(self, prompt):
            if self.version == 3 and len(stub.learners) == 1:
                raise ActorLost("generator 0 died")
            return await super().generate(prompt)

    stub.generators = lambda: [Dies()]
    await stub.run("run.max_lag_steps=0")
    first, second = stub.learners
    assert (len(first.trained), len(second.trained)) == (12, 12)
    assert audit(stub.run_dir).resumed_at == [3]


async def test_the_restarts_are_those_of_so_many_steps_of_progress(stub):
    stub.deaths = [20, 40, 60, 80]
    limits = "run.max_restarts=1", "run.restart_steps=20", "run.checkpoint_every_steps=10"
    summary = await stub.run("run.steps=100", *limits)
    assert summary["restarts"] == 4
    books = audit(stub.run_dir)
    assert (books.discrepancies, books.resumed_at) == ([], [20, 40, 60, 80])


async def test_restarts_without_progress_are_used_up_and_the_error_names_the_version(stub):
    stub.deaths = [5] * 9
    with pytest.raises(ActorLost, match="learner rank 0 died") as raised:
        await stub.run("run.max_restarts=3")
    assert raised.value.__notes__ == ["at version 5", "not saved"]
    waits = [why.partition(" for ")[0] for why in stub.told("starts again")]
    assert waits == ["from step 0,", "from step 0, in 0.01 s,", "from step 0, in 0.02 s,"]
    assert audit(stub.run_dir).discrepancies == []


def test_what_is_trained_again_is_no_progress():
    config = load(DEMO, ["run.max_restarts=3", "run.restart_steps=10"])
    budget = restarts.Restarts(config, Path("run"), {}, print)
    lost = 7, 3, 6, 7  # behind these steps, each time from the start
    assert [budget._wait_s(step) for step in lost] == [0, 1, 2, None]
    assert budget._wait_s(17) == 0  # ten steps further all three are forgotten
    assert [budget._wait_s(17) for _ in range(3)] == [1, 2, None]


async def test_actors_that_cannot_start_end_the_run_at_once(stub):
    stub.starts = [ActorLost("teacher 0 cannot be built: no memory")]
    with pytest.raises(ActorLost, match="cannot be built"):
        await stub.run()
    assert len(stub.seeds) == 1


@pytest.mark.parametrize("error", [ActorLost("again"), SystemFailed("Ray, its nodes")])
async def test_once_they_were_there_another_start_is_tried(stub, error):
    stub.deaths = [3]
    stub.starts = []
    serve = stub._roles

    async def second_start_fails():
        if len(stub.seeds) == 2:
            raise error
        return await serve()

    stub._roles = second_start_fails
    assert (await stub.run())["restarts"] == 2


async def test_a_run_that_goes_back_to_a_checkpoint_of_a_sync_that_failed_has_lost_nothing(stub):
    class Refuses(SimulatedGenerator):
        async def update(self, version, layout, oldest):
            if version == 4 and len(stub.learners) == 1:
                raise SyncFailed("no memory")
            await super().update(version, layout, oldest)

    stub.generators = lambda: [Refuses()]
    await stub.run()
    assert audit(stub.run_dir).resumed_at == [4] and rows_of(stub.run_dir) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("when", ["starting", "evaluating", "training"])
async def test_ctrl_c_before_the_first_step_leaves_nothing_untrue(stub, when):
    forever, reached = asyncio.Event(), asyncio.Event()

    async def hangs(*_):
        reached.set()
        await forever.wait()

    class Hangs(SimulatedGenerator):
        respond = hangs if when == "evaluating" else SimulatedGenerator.respond
        generate = hangs if when == "training" else SimulatedGenerator.generate

    stub.held_out, stub.generators = 3, lambda: [Hangs()]
    if when == "starting":
        stub._roles = hangs
    stub.run_dir.mkdir()
    (stub.run_dir / "mine").touch()
    earlier = {"run": {}, "student": {}, "data": {}}  # a run's
    (stub.run_dir / "config.json").write_text(json.dumps(earlier))
    running = asyncio.ensure_future(stub.run())
    await asyncio.wait_for(reached.wait(), 60)
    running.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await running
    assert "no checkpoint was saved: there is nothing to go on from" in raised.value.__notes__
    begun = when == "training"  # prompts are handed out
    assert (stub.run_dir / "mine").exists() != begun
    assert (stub.run_dir / "ledger.jsonl").exists() == begun
    assert (f"{stub.run_dir} is as it was" in raised.value.__notes__) != begun
    assert committed(stub.run_dir / "checkpoints") == {}


@pytest.fixture
async def resumed(stub):
    """Goes on from step 2 of a run of 6 steps, to step 8; learners are lost as `stub.deaths` and
    `stub.loads`, what their loads raise, say."""
    await stub.run("run.checkpoint_every_steps=2", "run.keep_checkpoints=9")
    stub.as_it_was = {
        name: (stub.run_dir / name).read_bytes() for name in ("config.json", "environment.json")
    }
    return lambda: runs.run(*to_resume(stub.run_dir / "checkpoints" / "000002", ["run.steps=8"]))


async def test_a_resume_that_is_lost_before_it_goes_on_starts_again_from_what_was_named(
    stub, resumed, monkeypatch
):
    load_state, loads = Learner.load_state, [ActorLost("learner rank 0 died"), None]

    async def dies(self, folder):
        if error := loads.pop(0):
            raise error
        await load_state(self, folder)

    dies.__name__ = "load_state"
    monkeypatch.setattr(Learner, "load_state", dies)
    summary = await resumed()
    assert stub.told("starts again") == ["from step 2, for ActorLost: learner rank 0 died"]
    assert (summary["version"], summary["steps"], len(stub.learners[-1].trained)) == (8, 6, 24)
    books = audit(stub.run_dir)
    assert (books.discrepancies, books.steps_asked, books.resumed_at) == ([], 8, [2])
    assert committed(stub.run_dir / "set-aside" / "1" / "checkpoints").keys() == {4, 6}


async def test_a_resume_and_a_restart_in_it_go_on_from_what_was_saved_last(stub, resumed):
    going_on = resumed()
    stub.deaths = [5]
    summary = await going_on
    assert (summary["version"], audit(stub.run_dir).resumed_at) == (8, [2, 4])
    assert audit(stub.run_dir).discrepancies == [] and rows_of(stub.run_dir) == [*range(1, 9)]


@pytest.mark.parametrize("end", ["Ctrl-C", "no actors", "full disk"])
async def test_a_resume_that_ends_before_it_goes_on_leaves_the_run_as_it_was(
    stub, resumed, end, monkeypatch
):
    reached = asyncio.Event()

    async def hangs():
        reached.set()
        await asyncio.Event().wait()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if end == "Ctrl-C":
        stub._roles = hangs
    elif end == "no actors":
        stub.starts = [ActorLost("teacher 0 cannot be built")]
    else:
        monkeypatch.setattr(set_aside, "copyfileobj", full)
    going_on = asyncio.ensure_future(resumed())
    if end == "Ctrl-C":
        await asyncio.wait_for(reached.wait(), 60)
        going_on.cancel()
    with pytest.raises((asyncio.CancelledError, ActorLost, CheckpointError)) as raised:
        await going_on
    if end == "full disk":
        assert f"{raised.value}" == "what lies behind step 2: No space left on device"
        assert raised.value.__notes__ == ["at version 2"]
    assert stub.as_it_was == {name: (stub.run_dir / name).read_bytes() for name in stub.as_it_was}
    books = audit(stub.run_dir)
    assert (books.discrepancies, books.finished, books.steps_asked) == ([], True, 6)
    monkeypatch.setattr(set_aside, "copyfileobj", shutil.copyfileobj)
    stub._roles = Stub._roles.__get__(stub)
    assert (await resumed())["version"] == 8
    assert audit(stub.run_dir).discrepancies == [] and audit(stub.run_dir).steps_asked == 8
    assert list(stub.run_dir.glob("*.next.json")) == []


@pytest.mark.parametrize("what", ["checkpoints", "config"])
async def test_the_first_error_stays_where_no_other_start_can_be_had(stub, what, monkeypatch):
    stub.deaths = [3]
    if what == "checkpoints":

        def late(*_):
            raise TimedOut("newest checkpoint: no answer in 600 s")

        monkeypatch.setattr(restarts, "newest", late)
    else:
        monkeypatch.setattr(runs, "read_run", lambda _: 1 / 0)
    with pytest.raises(ActorLost, match="learner rank 0 died") as raised:
        await stub.run()
    *_, note = raised.value.__notes__
    assert note.startswith("not started again: ") and ("no answer" in note or "division" in note)
