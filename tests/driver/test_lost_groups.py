"""What the main loop does about groups that come to nothing and scorers that differ, over simulated
roles."""

import asyncio
import json

import msgspec
import numpy as np
import pytest

from async_opd.config.load import load
from async_opd.core.errors import ScorerDiffers, TooManyDropped
from async_opd.core.roles import Roles
from async_opd.core.run_dir import LEDGER
from async_opd.driver import checkpoints
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import GroupFailed
from async_opd.driver.train import train
from async_opd.driver.train_loop import TrainLoop
from async_opd.telemetry.metrics import Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)

SETTINGS = (
    "run.steps=6",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "teacher.evaluate=false",
    "rollout.samples_per_prompt=2",
)


class Pair(SimulatedGenerator):
    """Two responses to each prompt."""

    async def generate(self, prompt):
        meta, group = await super().generate(prompt)
        twice = {name: getattr(meta, name) * 2 for name in ("spans", "truncated")}
        return msgspec.structs.replace(meta, **twice), group


class Teacher(SimulatedTeacher):
    """Scores both responses, but for the second of the prompts "3", "13", …; of none from prompt
    `until` on. It notes its probes by `version()`."""

    def __init__(self, until: int = 10**9, version=lambda: 0, answer=lambda version: 0.0):
        super().__init__()
        self.until, self.version, self.answer, self.probed = until, version, answer, []

    async def score(self, group):
        if int(group.id) >= self.until:
            return (f"{group.id}#0: nan", f"{group.id}#1: nan"), None
        return ("", f"{group.id}#1: nan" if group.id.endswith("3") else ""), None

    async def probe(self):
        version = self.version()
        self.probed.append(version)
        await asyncio.sleep(0)
        return np.full((2, 1), self.answer(version), np.float32)

    async def check_health(self): ...

    def kill(self): ...


class Run:
    """A run in `folder`, and what came of it."""

    def __init__(self, folder, *overrides: str):
        self.folder, self.config = folder, load("configs/demo.toml", [*SETTINGS, *overrides])
        (folder / "config.json").write_bytes(msgspec.json.encode(self.config))
        self.rows, self.events, self.learner = [], [], RecordingLearner()

    async def train(self, *teachers, generator=None, checkpoint=None, spawn=None):
        roles = Roles(
            generators=[generator or Pair()],
            teachers={"": teachers},
            verifier=SimulatedVerifier(),
            learner=self.learner,
            spawn=spawn,
        )
        meter = Meter([self.rows.append, self._write], asyncio.get_running_loop().time)
        return await train(
            self.config,
            roles,
            Prompts(),
            [],
            self.folder,
            meter,
            lambda *event: self.events.append(event),
            checkpoint,
        )

    def _write(self, row):
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def told(self, *names: str) -> list:
        return [event for event in self.events if event[0] in names]


async def test_a_group_goes_on_without_a_rollout_and_the_books_balance(tmp_path):
    run = Run(tmp_path)
    summary = await run.train(Teacher())
    # 12 prompts in 6 steps: "3" goes on with one of its two
    assert sorted(run.learner.trained, key=int) == [f"{id}" for id in range(12)]
    assert (summary["rollouts_failed"], summary["scored_dropped"]) == (1, 0)
    assert run.rows[-1]["rollouts_failed"] == 1
    ((_, who, why),) = run.told("failed")
    assert who == "teacher" and why.startswith("3#1: nan; its group goes on")
    books = audit(tmp_path)
    assert (books.discrepancies, books.failed_rollouts) == ([], {"teacher": 1})
    assert checkpoints.find(tmp_path).state.counters["outcomes"]["rollouts_failed"] == 1


async def test_a_checkpoint_counts_what_fails_while_it_waits_for_the_weights(tmp_path):
    run = Run(tmp_path)
    roles = Roles(
        generators=[Pair()],
        teachers={"": [Teacher()]},
        verifier=SimulatedVerifier(),
        learner=run.learner,
    )
    meter = Meter([], asyncio.get_running_loop().time)
    loop = TrainLoop(
        run.config,
        roles,
        Prompts(),
        [],
        tmp_path,
        meter,
        lambda *event: None,
        Ledger(tmp_path / LEDGER),
    )
    prompt = next(iter(Prompts()))
    loop.progress.ledger.handed_out(prompt.id)
    async with loop._weights:  # a newcomer takes them over
        saving = asyncio.create_task(loop.save())
        await asyncio.sleep(0)
        loop._outcomes.lost(prompt, 0, GroupFailed("teacher", "nan"))
    await saving
    loop.progress.ledger.close()
    kept = checkpoints.find(tmp_path).state.counters["outcomes"]["rollouts_failed"]
    assert kept == audit(tmp_path).failed_rollouts["teacher"] == 1


async def test_a_run_whose_groups_fail_saves_what_is_trained_and_ends_by_name(tmp_path):
    run = Run(tmp_path, "run.checkpoint_every_steps=0", "run.max_lag_steps=0")
    with pytest.raises(TooManyDropped, match=r"3 groups in a row failed \(3 teacher\).*#0: nan"):
        await run.train(Teacher(until=8))
    checkpoint = checkpoints.find(tmp_path)
    step = checkpoint.state.version
    assert step == run.learner.version == 4 and len(run.told("failed")) == 1
    assert audit(tmp_path).discrepancies == []

    again = Run(tmp_path)  # nothing is lost with it
    await again.train(Teacher(), checkpoint=checkpoint)
    assert len({*run.learner.trained, *again.learner.trained}) == 12
    assert audit(tmp_path).discrepancies == []


@pytest.mark.parametrize("policy", ["mask", "drop"])
async def test_where_every_response_is_cut_the_run_ends_and_names_the_setting(tmp_path, policy):
    run = Run(tmp_path, f"rollout.truncated={policy}", "rollout.max_new_tokens=7")
    with pytest.raises(
        TooManyDropped, match=r"none is left to train \(4 truncated\): rollout.max_new_tokens = 7"
    ):
        await asyncio.wait_for(run.train(Teacher(), generator=Pair(truncated=True)), 30)
    assert [event[:2] for event in run.told("truncated")] == [("truncated", "groups")]
    assert run.learner.version <= 2


async def test_cut_responses_that_are_trained_are_as_good_as_any(tmp_path):
    run = Run(tmp_path, "rollout.truncated=train")
    await run.train(Teacher(), generator=Pair(truncated=True))
    assert run.learner.version == 6 and run.told("truncated") == []


async def test_scorers_are_probed_at_the_start_and_every_few_steps(tmp_path):
    run = Run(tmp_path, "sync.parity_every_steps=2")
    fades = Teacher(version=lambda: run.learner.version, answer=lambda version: float(version >= 4))
    sound = Teacher(version=lambda: run.learner.version)
    await run.train(sound, fades)
    assert sound.probed[:3] == [0, 2, 4] and len(sound.probed) <= 4
    ((_, who, why),) = run.told("lost")
    assert who == "teacher 1" and "1.00e+00 nats" in why and fades.probed[-1] == 4


async def test_a_run_ends_by_name_behind_a_checkpoint_where_a_replacement_differs_too(tmp_path):
    run = Run(tmp_path, "run.steps=2000", "sync.parity_every_steps=2")

    def fades(version):
        return float(version >= 4)

    async def spawn(name, index):
        return Teacher(answer=lambda version: 1.0)

    live = Teacher(version=lambda: run.learner.version, answer=fades)
    with pytest.raises(ScorerDiffers, match=r"teacher 1: .* as the one before it"):
        await run.train(Teacher(), live, spawn=spawn)
    assert checkpoints.find(tmp_path).state.version == run.learner.version >= 4


async def test_self_teachers_are_probed_at_one_version(tmp_path):
    class Follows(Teacher):
        def __init__(self, slow: int):
            super().__init__(answer=float)
            self.slow, self.loads = slow, 0
            self.version = lambda: self.loads

        async def load(self, folder):
            for _ in range(self.slow):
                await asyncio.sleep(0)
            self.loads += 1

    student = load("configs/demo.toml").student.model
    run = Run(
        tmp_path,
        f"teacher.model={student}",
        "teacher.update=copy",
        "teacher.update_every_steps=1",
        "sync.parity_every_steps=1",
    )
    both = [Follows(0), Follows(20)]
    await run.train(*both)
    assert [teacher.probed for teacher in both] == [list(range(7))] * 2
    assert run.told("lost") == []
