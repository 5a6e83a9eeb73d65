"""A rank's part in updates by nccl, with gloo in NCCL's place: it answers while it waits, and
gathers to the end whatever becomes of the broadcast."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from async_opd.core.errors import DataError, SyncFailed
from async_opd.roles.learner.weight_group import LearnerGroup
from async_opd.roles.learner.weights import StudentWeights
from async_opd.roles.weight_sync.gloo import buckets, join_store
from async_opd.roles.weight_sync.nccl import NcclGroup
from tests.nccl_over_gloo import Communicator, play

HOST, BUCKET = "127.0.0.1", 4096
pytestmark = pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")


@pytest.fixture(autouse=True)
def over_gloo(monkeypatch):
    monkeypatch.setattr(Communicator, "gloo_s", 2.0)
    play(monkeypatch.setattr)


class Gathered:
    """Weights of a tiny model, and how often a bucket of them was gathered."""

    def __init__(self, lm):
        self.count = 0
        self.weights = StudentWeights(lm, BUCKET, self.gather)

    @contextmanager
    def gather(self, parameters):
        self.count += 1
        yield


@pytest.fixture
def gathered(tiny_lm):
    return Gathered(tiny_lm("Qwen3"))


def learner_group(gathered, timeout_s: float) -> LearnerGroup:
    settings = SimpleNamespace(backend="nccl", bucket_bytes=BUCKET, sync_s=timeout_s)
    return LearnerGroup(0, settings, gathered.weights)


async def with_member(group: LearnerGroup, timeout_s: float) -> NcclGroup:
    (place,) = group.open(HOST, 1, 1)
    assert (place.rank_offset, place.world, place.timeout_s) == (1, 2, timeout_s)
    store = join_store(HOST, place.port, timeout_s)
    with ThreadPoolExecutor(1) as thread:
        joining = thread.submit(NcclGroup, store, rank=1, world=2, timeout_s=timeout_s)
        await group.join(2)
    return joining.result()


async def test_a_rank_answers_while_it_waits_for_one_who_does_not_come(gathered):
    group = learner_group(gathered, 0.5)
    group.open(HOST, 1, 1)
    joining, ticks = asyncio.ensure_future(group.join(2)), 0
    while not joining.done():
        await asyncio.sleep(0.01)
        ticks += 1
    with pytest.raises(SyncFailed, match=r"of 2 members did not form: rank \[1\] of 2 did not"):
        await joining
    assert ticks > 3


async def test_leaving_ends_a_broadcast_that_hangs_and_every_bucket_is_gathered(gathered):
    group = learner_group(gathered, 60.0)
    hangs = await with_member(group, 60.0)
    weights = gathered.weights
    weights.described = weights.described * 200  # more than the buffers of sockets take
    weights.tensors = lambda: (w for _ in range(200) for w in StudentWeights.tensors(weights))
    sending = asyncio.ensure_future(group.send(7))
    await asyncio.sleep(0.2)
    assert not sending.done()
    await group.leave()
    with pytest.raises(SyncFailed, match=r"broadcast of version 7 broke off: .* it was left"):
        await sending
    assert gathered.count == 200 * len(list(buckets(weights._pieces, BUCKET)))
    hangs.destroy()


async def test_a_group_is_ended_before_the_next_is_opened(gathered):
    group = learner_group(gathered, 20.0)
    first = await with_member(group, 20.0)
    before = group._sender._group
    second = await with_member(group, 20.0)
    with pytest.raises(RuntimeError, match="no more: it was left"):
        before.broadcast(torch.zeros(1, dtype=torch.uint8), 0)
    for each in (first, second):
        each.destroy()


async def test_a_weight_that_has_become_another_is_named_and_ends_the_group(gathered):
    group = learner_group(gathered, 20.0)
    member = await with_member(group, 20.0)
    name = gathered.weights.described[0].name
    gathered.weights._lm.to(torch.bfloat16)  # as an engine may, behind the description
    with pytest.raises(DataError, match=f"{name} is bfloat16 .* described .* as float32"):
        await group.send(1)
    with pytest.raises(RuntimeError, match="no more"):
        group._sender._group.broadcast(torch.zeros(1, dtype=torch.uint8), 0)
    member.destroy()


def test_gathers_are_made_and_undone_on_the_default_stream_and_finished_before_use(
    tiny_lm, monkeypatch
):
    """Under streams of whoever asks, as in vLLM's packed producer."""
    current, log = ["default"], []

    @contextmanager
    def stream(of):
        current.append(of.name)
        yield
        current.pop()

    default = SimpleNamespace(name="default", synchronize=lambda: log.append("finished"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: default)
    monkeypatch.setattr(torch.cuda, "stream", stream)

    @contextmanager
    def gather(parameters):
        log.append(f"gather on {current[-1]}")
        yield
        log.append(f"free on {current[-1]}")

    weights = StudentWeights(tiny_lm("Qwen3"), BUCKET, gather)
    with stream(SimpleNamespace(name="packing")):
        for _ in weights.tensors():
            assert current[-1] == "packing" and log[-1] == "finished"
            log.append("weight")
    assert {line for line in log if " on " in line} == {"gather on default", "free on default"}
    frees = [n for n, line in enumerate(log) if line.startswith("free")]
    assert len(frees) > 1 and all(log[n + 1] == "finished" for n in frees)
    for n, line in enumerate(log):
        if line.startswith("gather"):
            assert log[n + 1] == "finished"


async def test_the_threads_own_stream_is_that_of_the_rank(gathered, monkeypatch):
    current, used = SimpleNamespace(name="the rank's"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda of: used.append(of) or nullcontext())
    group = learner_group(gathered, 0.2)
    group.open(HOST, 1, 1)
    with pytest.raises(SyncFailed):
        await group.join(2)
    assert used == [current]
