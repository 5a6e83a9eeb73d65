"""Faults over simulated roles in virtual time. Lengths are a function of the prompt, so that runs
can be compared."""

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from async_opd.config.load import load
from async_opd.config.schema import Config
from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, SyncFailed, TimedOut, TooManyDropped, WireError
from async_opd.core.roles import Roles
from async_opd.core.wire import StepResult
from async_opd.driver import checkpoints
from async_opd.driver.checkpoints import Checkpoint
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    Pace,
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

PACE = Pace.of(1, 1)
UPDATE_S = 10.0  # twice `sync.timeout_s`, as of a real one
STALL_S = 6.0  # as of a real one's port


class Mortal:
    """A role that dies: calls out and later ones raise ActorLost, as those of a dead actor do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.died, self.silent, self.asked = asyncio.Event(), False, []

    async def _live(self, call):
        answer, death = asyncio.ensure_future(call), asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait((answer, death), return_when=asyncio.FIRST_COMPLETED)
            if self.died.is_set():
                raise ActorLost(f"{type(self).__name__} died")
            if self.silent:
                await asyncio.sleep(60)
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()


class Generator(Mortal, SimulatedGenerator):
    async def generate(self, prompt):
        self.asked.append(prompt.id)
        return await self._live(super().generate(prompt))

    async def respond(self, prompt, sampling):
        self.asked.append(prompt.id)
        return await self._live(super().respond(prompt, sampling))

    async def update(self, *args):
        await bounded(self._live(super().update(*args)), UPDATE_S, "update")

    async def check_health(self):
        await bounded(self._live(super().check_health()), STALL_S, "sign of life")


class Teacher(Mortal, SimulatedTeacher):
    async def score(self, group):
        self.asked.append(group.id)
        return await self._live(super().score(group))

    async def check_health(self):
        await bounded(self._live(super().check_health()), STALL_S, "sign of life")


class Learner(RecordingLearner):
    """Momentum on one number: what it learns at a step depends on every step before. Dies in step
    `fatal`."""

    def __init__(self, pace: Pace, bound: int, fatal: int | None = None):
        super().__init__(pace, bound)
        self.weight, self.momentum, self.fatal, self.losses = 0.0, 0.0, fatal, []

    async def step(self, groups) -> StepResult:
        if self.version + 1 == self.fatal:
            raise ActorLost("learner rank 0 died")
        result = await super().step(groups)
        lengths = [sum(spans[-1].end for spans in ready.meta.spans) for ready in groups]
        loss = float(
            np.mean(
                [
                    np.sin(int(r.prompt.id) * n + self.weight)
                    for r, n in zip(groups, lengths, strict=True)
                ]
            )
        )
        self.momentum = 0.9 * self.momentum + loss
        self.weight -= 0.1 * self.momentum
        self.losses.append(loss)
        return result

    async def save_state(self, folder):
        Path(folder).mkdir()
        Path(folder, "state").write_bytes(
            msgspec.json.encode([self.version, self.weight, self.momentum])
        )

    async def load_state(self, folder):
        self.version, self.weight, self.momentum = msgspec.json.decode(
            Path(folder, "state").read_bytes()
        )


def config_of(run_dir: Path, *overrides: str) -> Config:
    settings = [
        "learner.trajectories_per_step=16",
        "learner.warmup_steps=0",
        "teacher.evaluate=false",
        *overrides,
    ]
    config = load("configs/demo.toml", settings)
    (run_dir / "config.json").write_bytes(msgspec.json.encode(config))
    return config


class Run:
    """One job in virtual time, its events but for checkpoints by the virtual second."""

    def __init__(self, run_dir: Path, *overrides: str):
        self.run_dir, self.config = run_dir, config_of(run_dir, *overrides)
        self.events: list[tuple[float, str, str]] = []
        self.rows: list[dict] = []
        self.spawned: list = []

    async def train(
        self,
        generators,
        teachers,
        learner,
        found: Checkpoint | None = None,
        start_s=20.0,
        replacement=Generator,
    ):
        """`start_s`: what a replacement takes to start; None: there is none. A generator's is a
        `replacement`."""
        clock = asyncio.get_running_loop().time

        async def spawn(name: str, index: int):
            await asyncio.sleep(start_s)
            self.spawned.append(
                replacement(PACE, 99 + index) if name == "generator" else Teacher(PACE)
            )
            return self.spawned[-1]

        roles = Roles(
            generators=generators,
            teachers={"": teachers},
            verifier=SimulatedVerifier(PACE),
            learner=learner,
            spawn=spawn if start_s is not None else None,
        )

        def emit(what, who, why):
            if who != "checkpoint":
                self.events.append((round(clock(), 3), what, who))

        meter = Meter([self.rows.append], clock)
        async with asyncio.timeout(10**5):
            return await train(self.config, roles, Prompts(), [], self.run_dir, meter, emit, found)

    def when(self, what: str) -> float:
        return next(at for at, told, _ in self.events if told == what)


def test_the_others_keep_their_pace_when_one_of_three_generators_dies_and_no_prompt_is_lost(
    tmp_path,
):
    # generation alone takes time
    pace = replace(PACE, step_s=PACE.step_s / 100, score_s=1e-6, sync_s=1e-6)
    run = Run(tmp_path, "run.steps=300", "run.max_lag_steps=8")

    async def main():
        generators = [Generator(pace, seed) for seed in range(3)]
        learner, marks = Learner(pace, 8), {}

        async def watch():
            for at in (5, 15, 16, 26):
                await asyncio.sleep(at - asyncio.get_running_loop().time())
                if at == 15:
                    generators[1].died.set()
                marks[at] = [generator.tokens for generator in generators]

        watching = asyncio.ensure_future(watch())
        summary = await run.train(generators, [SimulatedTeacher(pace)], learner, start_s=10**5)
        await watching
        return summary, learner, marks

    async def cut():
        try:
            return await main()
        except TimeoutError:
            raise AssertionError(run.events) from None

    summary, learner, marks = virtual(cut())
    before = [(b - a) / 10 for a, b in zip(marks[5], marks[15], strict=True)]
    # a second later already
    after = [(b - a) / 10 for a, b in zip(marks[16], marks[26], strict=True)]
    assert after[1] == 0
    assert all(now >= 0.95 * then for now, then in zip(after[::2], before[::2], strict=True))
    assert run.when("lost") == 15
    assert len(learner.trained) == len(set(learner.trained)) == 300 * 16
    assert summary["generator_lost"] == 1 and summary["max_lag_seen"] <= 8
    books = audit(tmp_path)
    assert (books.discrepancies, sum(books.dropped.values()), books.outstanding) == ([], 0, [])
    assert sum(books.returned.values()) > 0


def test_a_generator_that_stands_still_for_a_minute_is_replaced_and_what_it_says_later_is_not_heard(
    tmp_path,
):
    run = Run(tmp_path, "run.steps=200", "timeout.stall_s=6", "sync.timeout_s=5")

    async def main():
        generators, learner = [Generator(PACE, 0), Generator(PACE, 1)], Learner(PACE, 4)

        async def stop():
            await asyncio.sleep(10)
            generators[0].silent = True
            await asyncio.sleep(60)
            generators[0].silent = False

        stopping = asyncio.ensure_future(stop())
        await run.train(generators, [SimulatedTeacher(PACE)], learner)
        stopping.cancel()
        return learner

    learner = virtual(main())
    # 6 s of patience, a look each 2 s; or where it takes weights, what an update may take
    assert 16 <= run.when("lost") <= 12 + UPDATE_S
    # what a start takes here
    assert run.when("serves") == pytest.approx(run.when("lost") + 20, abs=1)
    assert len(learner.trained) == len(set(learner.trained)) == 200 * 16
    assert audit(tmp_path).discrepancies == []


def test_a_replacement_that_comes_while_a_checkpoint_is_saved_waits_for_it_and_serves(tmp_path):
    class OneAtATime(Learner):
        """Serves one call after another, as a rank does; a save takes long."""

        def __init__(self, *args):
            super().__init__(*args)
            self.free = asyncio.Lock()

        async def save(self, folder):
            async with self.free:
                await asyncio.sleep(100)
                await super().save(folder)

        async def open_group(self, generators):
            async with asyncio.timeout(20), self.free:
                return await super().open_group(generators)

    run = Run(tmp_path, "run.steps=80", "run.checkpoint_every_steps=40")

    async def main():
        generators, learner = [Generator(PACE, 0), Generator(PACE, 1)], OneAtATime(PACE, 4)
        # 20 s before it serves
        asyncio.get_running_loop().call_later(40 * PACE.step_s - 5, generators[0].died.set)
        await run.train(generators, [SimulatedTeacher(PACE)], learner)
        return learner

    learner = virtual(main())
    assert [event[1] for event in run.events] == ["lost", "serves"]
    assert run.when("serves") > run.when("lost") + 80  # the save came first
    assert len(set(learner.trained)) == 80 * 16


def test_a_replacement_that_takes_no_weights_serves_nobody_and_the_others_run_on(tmp_path):
    run = Run(tmp_path, "run.steps=150")
    killed = []

    class Refuses(Generator):
        async def update(self, version, layout, oldest):
            raise SyncFailed("out of memory")

        def kill(self):
            killed.append(self)

    async def main():
        generators, learner = [Generator(PACE, 0), Generator(PACE, 1)], Learner(PACE, 4)
        asyncio.get_running_loop().call_later(10, generators[0].died.set)
        await run.train(
            generators, [SimulatedTeacher(PACE)], learner, start_s=5, replacement=Refuses
        )
        return learner

    learner = virtual(main())
    assert [event[1] for event in run.events] == ["lost", "did not start"]
    assert killed == run.spawned and len(killed) >= 3  # tried again, ever more rarely
    waited = max(
        b["elapsed_s"] - a["elapsed_s"] for a, b in zip(run.rows, run.rows[1:], strict=False)
    )
    assert waited < 5
    assert len(set(learner.trained)) == 150 * 16


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_dead_teacher_is_rerouted_around_or_waited_for_and_nothing_is_dropped(tmp_path, teachers):
    run = Run(tmp_path, "run.steps=150")

    async def main():
        pool, learner = [Teacher(PACE) for _ in range(teachers)], Learner(PACE, 4)
        asyncio.get_running_loop().call_later(10, pool[0].died.set)
        summary = await run.train([Generator(PACE, 0)], pool, learner)
        return summary, learner

    summary, learner = virtual(main())
    told = [event[1] for event in run.events]
    assert told == (["lost", "serves"] if teachers == 2 else ["lost", "none left", "serves"])
    waited = max(
        b["elapsed_s"] - a["elapsed_s"] for a, b in zip(run.rows, run.rows[1:], strict=False)
    )
    assert waited > 15 if teachers == 1 else waited < 1  # seconds without a step
    assert len(learner.trained) == len(set(learner.trained)) == 150 * 16
    assert (summary["scored_dropped"], summary["max_lag_seen"] <= 4) == (0, True)
    assert audit(tmp_path).discrepancies == []


class Bad(Teacher):
    """Scores the first `spoiled` groups it is asked for wrongly, or too late."""

    def __init__(self, pace: Pace, error: Exception, spoiled: int):
        super().__init__(pace)
        self.error, self.spoiled = error, spoiled

    async def score(self, group):
        answer = await super().score(group)
        if len(self.asked) <= self.spoiled:
            raise self.error
        return answer


NAN = WireError("3#0: sampled_logp[2] = nan is not a finite log-prob <= 0")
LENGTH = WireError("3#0: sampled_logp has 7 rows for 8 tokens")


@pytest.mark.parametrize(
    "error",
    [NAN, LENGTH, TimedOut("teacher 0, each: no answer in 120 s")],
    ids=["nan", "length", "slow"],
)
def test_what_one_teacher_spoils_another_scores(tmp_path, error):
    run = Run(tmp_path, "run.steps=20")

    async def main():
        learner = Learner(PACE, 4)
        return await run.train(
            [Generator(PACE, 0)], [Bad(PACE, error, 3), Teacher(PACE)], learner
        ), learner

    summary, learner = virtual(main())
    assert (summary["scored_dropped"], run.events) == (0, [])  # nobody was given up for it
    assert len(set(learner.trained)) == 20 * 16


@pytest.mark.parametrize("error", [NAN, LENGTH], ids=["nan", "length"])
def test_what_no_teacher_can_score_in_four_tries_is_dropped_and_counted_with_its_cause(
    tmp_path, error
):
    run = Run(tmp_path, "run.steps=20", "run.max_attempts=2")

    class Refuses(Teacher):
        async def score(self, group):
            answer = await super().score(group)
            if group.id == "5":
                raise error
            return answer

    async def main():
        learner, pool = Learner(PACE, 4), [Refuses(PACE), Refuses(PACE)]
        return await run.train([Generator(PACE, 0)], pool, learner), learner, pool

    summary, learner, pool = virtual(main())
    tries = [teacher.asked.count("5") for teacher in pool]
    # two attempts of four tries, each begun by one and the other
    assert sum(tries) == 8 and min(tries) >= 2
    assert summary["dropped_failed"] == 2
    assert len(set(learner.trained)) == 20 * 16 and "5" not in learner.trained
    books = audit(tmp_path)
    assert (books.discrepancies, books.dropped, books.reissued) == (
        [],
        {"failed": 1},
        {"failed": 1},
    )


def test_a_teacher_that_spoils_everything_ends_the_run_with_what_it_said(tmp_path):
    run = Run(tmp_path, "run.steps=20")
    says = "17 of the last 32 groups failed.*17 teacher.*max_failed_share.*is not a finite log-prob"
    with pytest.raises(TooManyDropped, match=says):
        virtual(run.train([SimulatedGenerator(PACE)], [Bad(PACE, NAN, 10**6)], Learner(PACE, 4)))


def test_generation_goes_on_while_a_checkpoint_is_saved(tmp_path):
    run, tokens = Run(tmp_path, "run.steps=12", "run.checkpoint_every_steps=6"), []
    generator = SimulatedGenerator(PACE)

    class SlowDisk(Learner):
        async def save(self, folder):
            tokens.append(generator.tokens)
            await asyncio.sleep(2 * PACE.step_s)  # shorter than what the slots hold
            tokens.append(generator.tokens)
            await super().save(folder)

    virtual(run.train([generator], [SimulatedTeacher(PACE)], SlowDisk(PACE, 4)))
    pace = (tokens[1] - tokens[0]) / (2 * PACE.step_s)
    assert pace > 0.8 * PACE.concurrency / PACE.token_s  # of its full speed


def test_a_run_that_goes_on_from_a_checkpoint_learns_what_an_unbroken_one_does(tmp_path):
    def job(name: str, learner: Learner, found: Checkpoint | None = None) -> Learner:
        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(
            tmp_path / name, "run.steps=20", "run.max_lag_steps=0", "run.checkpoint_every_steps=3"
        )

        async def main():
            await run.train([SimulatedGenerator(PACE)], [SimulatedTeacher(PACE)], learner, found)

        virtual(main())
        return learner

    whole = job("whole", Learner(PACE, 0))
    with pytest.raises(ActorLost, match="learner rank 0 died"):
        job("broken", Learner(PACE, 0, fatal=12))
    found = checkpoints.find(tmp_path / "broken")
    assert found.state.version == 9
    rest = job("broken", Learner(PACE, 0), found)
    assert rest.trained == whole.trained[9 * 16 :]
    assert rest.losses == pytest.approx(whole.losses[9:], abs=1e-6)
    assert (rest.version, len(set(rest.losses))) == (20, 11)
    for name in ("whole", "broken"):
        books = audit(tmp_path / name)
        assert (books.discrepancies, books.steps, books.outstanding) == ([], 20, [])
    assert books.resumed_at == [9]


def test_a_run_that_goes_on_for_fewer_steps_than_it_was_to_have_balances_its_books(tmp_path):
    def job(learner: Learner, steps: int, found: Checkpoint | None = None) -> None:
        run = Run(tmp_path, f"run.steps={steps}", "run.checkpoint_every_steps=3")
        virtual(run.train([SimulatedGenerator(PACE)], [SimulatedTeacher(PACE)], learner, found))

    with pytest.raises(ActorLost):
        job(Learner(PACE, 4, fatal=12), 20)
    found = checkpoints.find(tmp_path)
    assert (found.state.version, len(found.state.outstanding)) == (9, 80)
    job(Learner(PACE, 4), 10, found)
    books = audit(tmp_path)
    assert (books.discrepancies, books.dropped) == ([], {"no step left": 64})
    assert (books.steps, books.finished, books.outstanding) == (10, True, [])
