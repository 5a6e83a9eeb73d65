"""How a run ends over simulated roles: what is trained is saved first; the first error stays."""

import asyncio
import contextlib
import errno
import os
import threading
from importlib import import_module
from pathlib import Path

import msgspec
import pytest

from async_opd.config.load import load
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    CheckpointError,
    DataError,
    Diverged,
    LedgerError,
    ParityError,
    StaleTrajectory,
    SyncFailed,
    SystemFailed,
    TimedOut,
    WireError,
)
from async_opd.core.roles import Roles
from async_opd.driver import checkpoints
from async_opd.driver.ledger import Ledger
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Jsonl, Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

trains = import_module("async_opd.driver.train")

SMALL = (
    "run.steps=5",
    "run.checkpoint_every_steps=0",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "teacher.evaluate=false",
)


class Learner(RecordingLearner):
    """Raises `error` in its fourth step; a step, a save and a look at it take their times."""

    def __init__(self, error=None, step_s=1.0, save_s=0.0, answers=True, refuses=None):
        super().__init__()
        self.error, self.step_s, self.save_s = error, step_s, save_s
        self.answers, self.refuses = answers, refuses or {}

    async def step(self, groups):
        await asyncio.sleep(self.step_s)
        if self.error and self.version == 3:
            raise self.error
        return await super().step(groups)

    async def weight_layout(self):
        if self.error and self.version == 3 and not self.answers:
            await asyncio.sleep(3600)
        return await super().weight_layout()

    async def save(self, folder):
        await asyncio.sleep(self.save_s)
        if self.version in self.refuses:
            raise self.refuses[self.version]
        await super().save(folder)


class Run:
    """One in virtual time."""

    def __init__(self, run_dir: Path, *overrides: str):
        self.run_dir, self.config = run_dir, load("configs/demo.toml", [*SMALL, *overrides])
        (run_dir / "config.json").write_bytes(msgspec.json.encode(self.config))
        self.events, self.seconds = [], 0.0

    async def train(self, learner, source=None, found=None, **roles):
        meter = Meter([Jsonl(self.run_dir / "metrics.jsonl")], asyncio.get_running_loop().time)
        roles = (
            dict(
                generators=[SimulatedGenerator()],
                teachers={"": [SimulatedTeacher()]},
                verifier=SimulatedVerifier(),
            )
            | roles
        )
        try:
            return await train(
                self.config,
                Roles(learner=learner, **roles),
                source or Prompts(),
                [],
                self.run_dir,
                meter,
                lambda *event: self.events.append(event),
                found,
            )
        finally:
            self.seconds = asyncio.get_running_loop().time()

    def fails(self, learner, **roles) -> AsyncOpdError:
        with pytest.raises(AsyncOpdError) as raised:
            virtual(self.train(learner, **roles))
        return raised.value

    @property
    def saved(self) -> list[int]:
        return sorted(checkpoints.committed(self.run_dir / "checkpoints"))


@pytest.mark.parametrize(
    "kind",
    [Diverged, CallFailed, SyncFailed, ParityError, StaleTrajectory, WireError, SystemFailed],
)
def test_whatever_named_error_ends_a_run_saves_what_is_trained_first(tmp_path, kind):
    run, error = Run(tmp_path), kind("step 4")
    assert run.fails(Learner(error)) is error
    assert (run.saved, error.__notes__) == ([3], ["at version 3"])
    assert audit(tmp_path).discrepancies == []
    virtual(run.train(Learner(), found=checkpoints.find(tmp_path)))
    books = audit(tmp_path)
    assert (books.discrepancies, books.finished, books.resumed_at) == ([], True, [3])


def test_an_error_of_another_role_saves_the_step_at_hand_too(tmp_path):
    class Dies(SimulatedGenerator):
        async def check_health(self):
            if self.version == 3:
                raise ActorLost("generator 0 died")

    run = Run(tmp_path, "run.steps=50")
    error = run.fails(Learner(step_s=9), generators=[Dies()])
    assert (f"{error}", run.saved) == ("generator 0 died", [4])


@pytest.mark.parametrize("kind", [ActorLost, TimedOut])
def test_a_learner_that_is_lost_or_of_no_known_version_is_asked_for_nothing_more(tmp_path, kind):
    run, error = Run(tmp_path), kind("learner rank 1: gone")
    assert run.fails(Learner(error)) is error
    assert (run.saved, error.__notes__) == ([], ["at version 3", "not saved"])
    assert run.events[-1] == ("not saved", "checkpoint", "learner rank 1: gone")


def test_a_rank_that_does_not_answer_holds_the_end_up_for_a_moment_only(tmp_path):
    run, error = Run(tmp_path), CallFailed("learner rank 1, step: out of memory")
    assert run.fails(Learner(error, answers=False)) is error
    assert run.saved == [] and run.seconds == 4 + run.config.timeout.stall_s
    assert error.__notes__[1] == "not saved: learner, sign of life: no answer in 30 s"


@pytest.mark.parametrize(
    "refusal", [CheckpointError("full"), Diverged("not finite"), OSError("full"), KeyError("full")]
)
def test_the_first_error_stays_where_saving_fails_and_says_so(tmp_path, refusal):
    run, error = Run(tmp_path), SyncFailed("first")
    assert run.fails(Learner(error, refuses={3: refusal})) is error
    assert error.__notes__[1].startswith("not saved: ") and run.saved == []
    assert (f"{refusal.args[0]}") in error.__notes__[1]


def test_the_first_error_stays_where_ctrl_c_comes_while_it_is_saved(tmp_path):
    run, error = Run(tmp_path), Diverged("first")

    async def main():
        running = asyncio.ensure_future(run.train(Learner(error, save_s=1000)))
        await asyncio.sleep(10)
        running.cancel()
        return await running

    with pytest.raises(Diverged, match="first"):
        virtual(main())
    assert (run.seconds, error.__notes__[1]) == (10, "not saved: it was interrupted")


def test_the_first_error_stays_where_others_fail_as_they_are_cut_off(tmp_path):
    class Dies(SimulatedVerifier):
        async def check(self, group):
            try:
                if int(group.id) < 16:  # those of the fourth step and before
                    return await super().check(group)
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                raise ActorLost("the verifier died of it") from None

    run, error = Run(tmp_path), Diverged("first")
    assert run.fails(Learner(error), verifier=Dies()) is error
    assert run.saved == [3]


def test_books_that_the_disk_refuses_end_a_run_by_name_and_hide_no_other_error(
    tmp_path, monkeypatch
):
    run, error = Run(tmp_path), Diverged("first")
    learner, fsync = Learner(error), os.fsync

    def refuses(file):
        if learner.version == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuses)
    # by the ledger in the third step's own sync
    ended = run.fails(learner)
    assert isinstance(ended, LedgerError) and run.saved == []
    assert sum("No space left" in note for note in ended.__notes__) <= 1


@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("end", [None, DataError("row 14: no answer")])
def test_the_end_of_the_data_trains_what_is_outstanding_first(tmp_path, lag, end):
    class Few(Prompts):
        def __iter__(self):
            yield from super().__iter__()
            if end:
                raise end

    run, learner = Run(tmp_path, f"run.max_lag_steps={lag}", "run.steps=50"), Learner()
    error = run.fails(learner, source=Few(14))
    assert isinstance(error, DataError)
    assert sorted(map(int, learner.trained)) == [*range(12)] and run.saved == [3]
    assert [event[:2] for event in run.events] == [
        ("no more prompts", "data"),
        ("saved", "checkpoint"),
    ]
    assert audit(tmp_path).outstanding == ["12", "13"] and audit(tmp_path).discrepancies == []


def test_a_full_disk_is_told_and_tried_again_at_the_next_checkpoint(tmp_path):
    run = Run(tmp_path, "run.checkpoint_every_steps=1")
    full = CheckpointError("checkpoint: No space left on device")
    virtual(run.train(Learner(refuses={2: full, 3: full})))
    assert run.saved == [1, 4, 5]
    told = [event[2] for event in run.events if event[0] == "not saved"]
    assert told == [f"{full}; tried again at the next"] * 2
    assert audit(tmp_path).discrepancies == []


def test_of_the_last_save_a_full_disk_is_an_error(tmp_path):
    run = Run(tmp_path, "run.checkpoint_every_steps=3")
    error = run.fails(Learner(refuses={5: CheckpointError("No space left")}))
    assert (run.saved, error.__notes__) == ([3], ["at version 5", "not saved"])


@pytest.mark.parametrize(
    ("minutes", "steps", "saved"), [(2.5, 0, [3, 6, 8]), (2.5, 2, [4, 6, 8]), (0, 0, [8])]
)
def test_checkpoints_come_by_time_too(tmp_path, minutes, steps, saved):
    settings = f"run.checkpoint_minutes={minutes}", f"run.checkpoint_every_steps={steps}"
    run = Run(tmp_path, "run.steps=8", "timeout.stall_s=600", *settings)
    virtual(run.train(Learner(step_s=60)))
    assert run.saved == saved


@pytest.mark.parametrize(("last_save_s", "saved"), [(18, []), (40, [2])])
def test_the_time_of_a_last_save_is_a_setting(tmp_path, last_save_s, saved):
    run, notes = Run(tmp_path, f"timeout.last_save_s={last_save_s}"), []

    async def main():
        running = asyncio.ensure_future(run.train(Learner(step_s=20, save_s=15)))
        await asyncio.sleep(21)  # in the second step
        running.cancel()
        try:
            await running
        except asyncio.CancelledError as e:
            notes.extend(getattr(e, "__notes__", ()))

    virtual(main())
    assert run.saved == saved
    refused = "not saved: the step at hand, or saving, takes more than 18 s"
    assert notes == ([] if saved else [refused])


def test_a_run_that_has_trained_nothing_saves_nothing(tmp_path):
    async def main():
        running = asyncio.ensure_future(run.train(Learner(step_s=100)))
        await asyncio.sleep(10)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    run = Run(tmp_path)
    virtual(main())
    assert (run.saved, [event[0] for event in run.events]) == ([], ["not saved"])


async def test_a_ledger_whose_opening_was_given_up_is_not_cut_under_the_next(tmp_path, monkeypatch):
    opened, hangs = [], threading.Event()

    class Slow(Ledger):
        def __init__(self, path):
            opened.append(path)
            hangs.wait(60)
            super().__init__(path)

    monkeypatch.setattr(trains, "Ledger", Slow)
    late = Run(tmp_path, "timeout.step_s=0.2")
    for _ in range(2):
        with pytest.raises(TimedOut, match=r"ledger, opened: no answer in 0\.2 s"):
            await late.train(Learner(step_s=0))
        assert len(opened) == 1  # the second waits for the first
    hangs.set()
    await Run(tmp_path).train(Learner(step_s=0))
    books = audit(tmp_path)
    assert len(opened) == 2 and (books.discrepancies, books.finished) == ([], True)
