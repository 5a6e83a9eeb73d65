"""No error is reported as never retrieved: who waited for it has been told of another, and why."""

import asyncio
import os
import threading
from itertools import count

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.config.load import load
from async_opd.core import ports
from async_opd.core.errors import ActorLost, CallFailed, LedgerError
from async_opd.core.roles import Roles
from async_opd.core.wire import Group, Prompt, Rollout, Span
from async_opd.driver.ledger import Ledger
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.train import train
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.runtime.actor_specs import make_verifier
from async_opd.runtime.actors import LINGER_S
from async_opd.runtime.remote_learner import RemoteLearner
from async_opd.runtime.remote_role import RemoteRole
from async_opd.telemetry.metrics import Meter
from tests.runtime.test_ports import TIMEOUTS
from tests.simulated.roles import (
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.runs import acted, replica

DEMO = load("configs/demo.toml")


async def test_of_the_calls_that_the_last_teacher_has_when_it_is_lost(unheard):
    class Teacher:
        """An actor that answers nothing until it dies; of each call that is told a moment after the
        one before."""

        died, calls = asyncio.Event(), count()

        def call(self, *_): ...

        async def call_keeping(self, *_):
            await self.died.wait()
            await asyncio.sleep(0.01 * next(self.calls))
            raise ActorLost("teacher 0 died")

        def kill(self): ...

    teacher = Teacher()
    pool = ReplicaPool("teacher", [RemoteRole(teacher, ports.Teacher, TIMEOUTS)])
    asking = []
    for group in ("a", "b", "c"):  # in a remote call each
        asking.append(asyncio.ensure_future(pool.ask(ports.Teacher.score, group)))
        await asyncio.sleep(2 * LINGER_S)
    teacher.died.set()
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert [str(error) for error in errors] == ["teacher 0 died"] * 3
    await asyncio.sleep(0.05)
    del asking, errors, pool, teacher
    assert unheard() == []


async def test_of_a_rank_that_dies_once_nobody_waits_for_it(unheard):
    class Rank:
        died = asyncio.Event()

        async def call(self, timeout_s, method, *args):
            await self.died.wait()
            raise ActorLost("learner rank 0 died")

    saving = asyncio.ensure_future(RemoteLearner([Rank()], "", 64, DEMO, TIMEOUTS).save("folder"))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    Rank.died.set()
    await asyncio.sleep(0.01)
    assert unheard() == []


async def test_of_a_probe_that_fails_beside_another(unheard):
    class Broken(SimulatedGenerator):
        async def probe(self):
            raise CallFailed("no probe")

    pool = ReplicaPool("generator", [Broken(), Broken()])
    with pytest.raises(CallFailed, match="no probe"):
        await WeightPublisher(
            replica(SimulatedLearner()), pool, parity_every=1, tolerance=1e-3
        ).publish(1, admit=lambda: None)
    del pool
    assert unheard() == []


async def test_of_a_step_that_an_interruption_did_not_wait_for(unheard, tmp_path):
    class Hangs(SimulatedLearner):
        begun, died = asyncio.Event(), asyncio.Event()

        async def step(self, groups):
            self.begun.set()
            await self.died.wait()
            raise ActorLost("learner rank 0 died")

    timeout = msgspec.structs.replace(DEMO.timeout, last_save_s=0.01)
    config = msgspec.structs.replace(DEMO, timeout=timeout)
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"": [SimulatedTeacher()]},
        verifier=SimulatedVerifier(),
        learner=Hangs(),
    )
    running = asyncio.ensure_future(train(config, roles, Prompts(), [], tmp_path, Meter([])))
    await Hangs.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    Hangs.died.set()
    await asyncio.sleep(0.01)
    del running
    assert unheard() == []


async def test_of_a_batch_of_the_ledger_whose_caller_was_cancelled(unheard, tmp_path, monkeypatch):
    refused = threading.Event()

    def fsync(descriptor):
        refused.wait(10)
        raise OSError(28, "No space left on device")

    ledger = Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(os, "fsync", fsync)
    ledger.handed_out("1@0")
    syncing = asyncio.ensure_future(ledger.sync())
    await asyncio.sleep(0.01)
    syncing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await syncing
    refused.set()
    with pytest.raises(LedgerError, match="No space left"):  # it is told at the next
        ledger.close()
    await asyncio.sleep(0.01)
    del syncing
    assert unheard() == []


async def test_of_groups_that_a_lost_pool_of_verifiers_cannot_check(unheard):
    verifier = make_verifier(DEMO.verify, Tokenizer(WordLevel()).to_str(), 1.0)  # not started
    actor = acted(verifier)
    outcomes = await actor.each("check", *map(group, range(3)))
    assert {f"{outcome}" for outcome in outcomes} == {"verifier pool is not started"}, outcomes
    del verifier, actor, outcomes
    assert unheard() == []


def group(index: int) -> Group:
    ids = np.array([1], np.int32)
    rollout = Rollout(
        id=f"{index}@0#0",
        ids=ids,
        behaviour_logp=np.array([-1.0], np.float32),
        spans=(Span(version=0, start=0, end=1),),
        truncated=False,
    )
    return Group(prompt=Prompt(id=f"{index}@0", ids=ids, answer="2"), rollouts=(rollout,))
