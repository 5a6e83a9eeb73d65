"""An update by nccl, with gloo in NCCL's place: what is sent is what arrives, and whoever is gone
or hangs keeps nobody waiting for longer than the timeout."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import PrefixStore
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import packed_tensor
from vllm.utils import torch_utils

from async_opd.core.errors import DataError
from async_opd.roles.weight_sync import nccl
from async_opd.roles.weight_sync.gloo import TensorMeta, join_store, open_store
from async_opd.roles.weight_sync.nccl import NcclGroup, meet
from async_opd.roles.weight_sync.sender import SENDERS, NcclSender
from tests.nccl_over_gloo import Communicator, play

pytestmark = pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
HOST = "127.0.0.1"
SOON_S = 10.0  # behind a timeout of a second or less, on a busy machine
COMMUNICATOR = nccl.communicator  # the real one
SHAPES = [(1000, 16), (16,), (64, 16), (16, 64), (16,), (48, 16)] * 3


@pytest.fixture(autouse=True)
def over_gloo(monkeypatch):
    monkeypatch.setattr(Communicator, "gloo_s", 2.0)
    play(monkeypatch.setattr)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def joined(pool, world: int, timeout_s: float, bucket: int = 4096):
    """A sender that has been joined by the others, and their groups."""
    sender = NcclSender(HOST, bucket_bytes=bucket, timeout_s=timeout_s)
    coming = [pool.submit(member, sender.port, rank, world, timeout_s) for rank in range(1, world)]
    sender.join(world)
    return sender, [each.result() for each in coming]


def member(port: int, rank: int, world: int, timeout_s: float) -> NcclGroup:
    store = join_store(HOST, port, timeout_s)
    return NcclGroup(store, rank=rank, world=world, timeout_s=timeout_s)


def receive(group: NcclGroup, described, bucket: int) -> dict[str, torch.Tensor]:
    """By vLLM's own consumer."""
    arrived: dict[str, torch.Tensor] = {}
    with group.bounded():
        packed_tensor.packed_nccl_broadcast_consumer(
            ((m.name, (list(m.shape), getattr(torch, m.dtype))) for m in described),
            group,
            0,
            lambda items: arrived.update({name: weight.clone() for name, weight in items}),
            buffer_size_bytes=bucket,
            device="cpu",
        )
    return arrived


def weights_of(dtype: str):
    described = [TensorMeta(f"w{n}", dtype, shape) for n, shape in enumerate(SHAPES)]
    torch.manual_seed(0)
    return described, [torch.randn(shape).to(getattr(torch, dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket", [64, 4096, 1 << 20])
def test_what_is_sent_is_what_vllms_own_consumer_receives(pool, dtype, bucket):
    sender, groups = joined(pool, 3, 30.0, bucket)
    described, weights = weights_of(dtype)
    for _ in range(2):
        arriving = [pool.submit(receive, group, described, bucket) for group in groups]
        sender.send(described, (weight for weight in weights))
        for each in arriving:
            got = each.result()
            assert list(got) == [meta.name for meta in described]
            assert all(torch.equal(got[f"w{n}"], weight) for n, weight in enumerate(weights))
        weights = [weight * -3 + 1 for weight in weights]


@pytest.mark.parametrize("backend", SENDERS)
@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ([torch.ones(3), torch.ones(4, dtype=torch.bfloat16)], r"b is bfloat16 \[4\], but descr"),
        ([torch.ones(3), torch.ones(2, 2)], r"b is float32 \[2, 2\], but .* as float32 \[4\]"),
        ([torch.ones(3)], "b is described, but not there"),
        ([torch.ones(3), torch.ones(4), torch.ones(1)], "more weights"),
    ],
    ids=["dtype", "shape", "fewer", "more"],
)
def test_a_weight_that_is_not_as_described_is_an_error_before_a_byte_of_it_leaves(
    backend, weights, why, monkeypatch
):
    sender, left = SENDERS[backend](HOST, bucket_bytes=8, timeout_s=5.0), []

    class Counts:
        def bounded(self):
            return nullcontext()

        def broadcast(self, tensor, src, stream=None):
            left.append(tensor.numel() * tensor.element_size())
            return SimpleNamespace(wait=lambda: None)

    sender._group = Counts()
    monkeypatch.setattr(
        "async_opd.roles.weight_sync.sender.broadcast", lambda group, flat: group.broadcast(flat, 0)
    )
    described = [TensorMeta("a", "float32", (3,)), TensorMeta("b", "float32", (4,))]
    with pytest.raises(DataError, match=why):
        sender.send(described, weights)
    assert sum(left) <= 4 * sum(w.numel() for w in weights[: 2 if why == "more weights" else 1])


def test_vllms_own_communicator_meets_in_the_store_or_says_that_there_is_no_nccl(pool, monkeypatch):
    store = open_store(HOST, 5.0)

    def made(rank: int):
        mine = join_store(HOST, store.port, 5.0) if rank else store
        return COMMUNICATOR(PrefixStore("nccl", mine), rank, 2, 3)

    for each in [pool.submit(made, rank) for rank in range(2)]:
        assert "no NCCL library" in f"{each.exception()}"

    class Library:
        """NCCL up to `ncclCommInitRank`."""

        def __init__(self, path):
            self.ncclGetRawVersion, self.ncclGetVersion = int, str

        def ncclGetUniqueId(self):
            return pynccl.ncclUniqueId((7,) * 128)

    met: list[tuple[int, ...]] = []
    monkeypatch.setattr(pynccl, "NCCLLibrary", Library)
    monkeypatch.setattr(
        pynccl.PyNcclCommunicator,
        "_init_comm",
        lambda self, device: met.append(
            (self.rank, self.world_size, device, *self.unique_id.internal)
        ),
    )
    for each in [pool.submit(made, rank) for rank in range(2)]:
        assert not each.result().disabled
    assert sorted(met) == [(rank, 2, 3, *[7] * 128) for rank in range(2)]


def test_who_does_not_come_is_named_before_nccl_is_entered(pool, monkeypatch):
    monkeypatch.setattr(nccl, "communicator", lambda *_: pytest.fail("entered"))
    sender = NcclSender(HOST, bucket_bytes=8, timeout_s=1.0)
    came = pool.submit(member, sender.port, 2, 4, 1.0)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank \[1, 3\] of 4 did not come within 1 s"):
        sender.join(4)
    with pytest.raises(RuntimeError, match=r"not all of 4 members came|[Cc]onnection"):
        came.result()
    assert time.monotonic() - started < SOON_S


def test_a_member_that_has_given_up_is_not_counted_on(pool):
    store = open_store(HOST, 5.0)
    early = pool.submit(meet, join_store(HOST, store.port, 5.0), rank=1, world=3, timeout_s=0.2)
    with pytest.raises(RuntimeError, match="not all of 3 members came"):
        early.result()
    late = pool.submit(meet, join_store(HOST, store.port, 5.0), rank=2, world=3, timeout_s=2.0)
    with pytest.raises(RuntimeError, match=r"rank \[1\] of 3 did not wait for"):
        meet(store, rank=0, world=3, timeout_s=1.0)
    assert late.exception()


def test_a_communicator_that_does_not_form_is_left_and_destroyed_when_it_does(pool, monkeypatch):
    """`ncclCommInitRank` with a member that hangs in it."""
    go, destroyed = threading.Event(), threading.Event()

    def hangs(*_):
        go.wait()
        return SimpleNamespace(destroy=destroyed.set)

    monkeypatch.setattr(nccl, "communicator", hangs)
    sender = NcclSender(HOST, bucket_bytes=8, timeout_s=1.0)
    other = pool.submit(member, sender.port, 1, 2, 1.0)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="NCCL connects them not within 1 s"):
        sender.join(2)
    assert other.exception() and time.monotonic() - started < SOON_S
    go.set()
    assert destroyed.wait(SOON_S)


def test_a_member_that_hangs_costs_the_others_the_timeout_and_no_garbage_passes_for_weights(pool):
    sender, (hangs, other) = joined(pool, 3, 1.0)
    described, weights = weights_of("float32")
    started, arriving = time.monotonic(), pool.submit(receive, other, described, 4096)
    with pytest.raises(RuntimeError, match=r"no more: it was aborted after 1 s"):
        for _ in range(100):  # gloo's first ones fit into the buffers of sockets
            sender.send(described, weights)
    with pytest.raises(RuntimeError, match="no more: it was aborted"):
        arriving.result()
        for _ in range(100):
            receive(other, described, 4096)
    assert time.monotonic() - started < SOON_S
    with pytest.raises(RuntimeError, match="no more"):
        sender.send(described, weights)
    del hangs


def test_one_who_leaves_ends_a_broadcast_that_hangs_in_another_thread(pool):
    sender, groups = joined(pool, 2, 60.0)
    described, _ = weights_of("float32")
    hangs = pool.submit(receive, groups[0], described, 4096)
    time.sleep(0.1)
    assert not hangs.done()
    groups[0].destroy()
    with pytest.raises(RuntimeError, match="it was left"):
        hangs.result(SOON_S)
    sender.leave()
    sender.leave()


def test_the_stream_of_the_thread_that_joins_stays_as_it_is(pool, monkeypatch):
    """vLLM sets another current stream in the thread that forms a communicator."""

    class AsVllm(Communicator):
        def __init__(self, *args):
            torch_utils.current_stream()
            assert hasattr(torch_utils._current_stream_tls, "value")
            super().__init__(*args)

    monkeypatch.setattr(nccl, "communicator", AsVllm)

    def join():
        store = open_store(HOST, 9.0)
        other = pool.submit(member, store.port, 1, 2, 9.0)
        group = NcclGroup(store, rank=0, world=2, timeout_s=9.0)
        other.result()
        group.destroy()
        return hasattr(torch_utils._current_stream_tls, "value")

    with ThreadPoolExecutor(1) as fresh:
        assert not fresh.submit(join).result()


def test_what_is_sent_waits_for_the_callers_stream(pool, monkeypatch):
    sender, (group,) = joined(pool, 2, 30.0)
    described, weights = weights_of("float32")
    order = []
    ends = SimpleNamespace(synchronize=lambda: order.append("caller's stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: ends)

    def gathered():
        for weight in weights:
            order.append("weight")
            yield weight

    arriving = pool.submit(receive, group, described, 4096)
    sender.send(described, gathered())
    arriving.result()
    assert order == ["caller's stream", *["weight"] * len(weights)]
