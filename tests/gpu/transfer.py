"""Weights on their way from the learner to an engine's workers, over CUDA streams and NCCL."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from async_opd.roles.weight_sync.gloo import TensorMeta, gloo_group, join_store
from async_opd.roles.weight_sync.nccl import NcclGroup
from async_opd.roles.weight_sync.sender import SENDERS, NcclSender
from tests.gpu.place import GIB, Place, Record, visible

BUCKET = 256 * 2**20  # sync.bucket_mib's own
HOST = "127.0.0.1"
TIMEOUT_S = 20.0  # sync.timeout_s's own
ABORT_S = 5.0  # within which a send to a dead peer must come back
JOINED = b"joined"  # what the other end says then; it takes nothing of what is sent
BEHIND = 200  # operations that a write waits behind, so that it is in flight when it is sent


class Loopback:
    """Stands for the communicator between both sides of one process: what is broadcast is kept on
    the stream that is current, as NCCL would read it there. It has no bound to keep."""

    bounded = staticmethod(nullcontext)

    def __init__(self):
        self.chunks: deque[Tensor] = deque()

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self.chunks.append(tensor.clone())

    def receive(self, tensor: Tensor, src: int) -> None:
        chunk = self.chunks.popleft()
        assert chunk.numel() == tensor.numel(), f"{chunk.numel()} bytes for {tensor.numel()}"
        tensor.copy_(chunk)


@contextmanager
def streams(place: Place) -> Iterator[None]:
    """On a CPU, which has none, put streams that do nothing where vLLM asks for its own."""
    with ExitStack() as patches:
        if place.device == "cpu":
            packing = "vllm.distributed.weight_transfer.packed_tensor"
            none = [SimpleNamespace(synchronize=lambda: None)] * 2
            for name, stand_in in {
                f"{packing}._get_streams": lambda *_: none,
                "torch.accelerator.current_device_index": lambda: 0,
                "torch.cuda.stream": nullcontext,
                "torch.cuda.current_stream": lambda: none[0],
            }.items():
                patches.enter_context(mock.patch(name, stand_in))
        yield


def packed(place: Place, record: Record) -> None:
    """What the learner's sender packs, vLLM's consumer unpacks to equal bytes, also where a write
    of a weight was still in flight on the stream that has computed it."""
    with streams(place):
        _packed(place, record)


def _packed(place: Place, record: Record) -> None:
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

    described = layout(place)
    weights = [torch.zeros(m.shape, dtype=torch.bfloat16, device=place.device) for m in described]
    wire = Loopback()
    sender = NcclSender(HOST, bucket_bytes=BUCKET, timeout_s=TIMEOUT_S)
    sender._group = wire
    sender.send(described, weights)  # warms up streams and allocator
    wire.chunks.clear()
    place.synchronize()
    place.empty()
    held = place.peak_gib()
    began = time.perf_counter()
    sender.send(described, weights)
    seconds = time.perf_counter() - began
    sent = sum(meta.nbytes for meta in described)
    peak = place.peak_gib() - held - sent / GIB  # the copy that stands for the other card
    wire.chunks.clear()
    slow_write(place, weights)
    sender.send(described, weights)
    place.synchronize()
    got: dict[str, Tensor] = {}
    packed_nccl_broadcast_consumer(
        ((meta.name, (list(meta.shape), torch.bfloat16)) for meta in described),
        Receiver(wire),
        0,
        lambda items: got.update((name, tensor.clone()) for name, tensor in items),
        buffer_size_bytes=BUCKET,
        device=place.device,
    )
    place.synchronize()
    stale = [
        meta.name
        for meta, weight in zip(described, weights, strict=True)
        if not torch.equal(got[meta.name], weight)
    ]
    record(
        f"{len(described)} weights",
        gb_per_s=sent / 1e9 / seconds,
        peak_gib=peak,
        stale=len(stale),
    )
    assert not stale, f"{len(stale)} weights were sent before they were written: {stale[:3]}"


class Receiver:
    """The consumer's end of a loopback."""

    def __init__(self, wire: Loopback):
        self._wire = wire

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._wire.receive(tensor, src)


def slow_write(place: Place, weights: list[Tensor]) -> None:
    """Start to write 1, 2, ... to the weights behind work that keeps the current stream busy."""
    size = 64 if place.tiny else 8192
    busy = torch.ones(size, size, device=place.device, dtype=torch.bfloat16)
    for _ in range(1 if place.tiny else BEHIND):
        busy = busy @ busy
    for number, weight in enumerate(weights):
        weight.fill_(1 + number % 100)


def layout(place: Place) -> list[TensorMeta]:
    """The weights of a student as they are sent."""
    shape = place.large
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "norm": (hidden,),
    }
    named = {"embedding": (shape["vocab_size"], hidden)} | {
        f"{i}.{name}": size
        for i in range(shape["num_hidden_layers"])
        for name, size in layer.items()
    }
    return [TensorMeta(name, "bfloat16", size) for name, size in named.items()]


def killed_peer(place: Place, record: Record, backend: str) -> None:
    """A send whose other end is killed comes back: over nccl within seconds of the abort, over gloo
    within the timeout. Ends of two cards."""
    described = [
        TensorMeta(f"{i}", "bfloat16", (4096, 8192)) for i in range(1 if place.tiny else 8)
    ]
    sender = SENDERS[backend](HOST, bucket_bytes=BUCKET, timeout_s=TIMEOUT_S)
    group = sender.group(1, 2)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.transfer", backend, f"{group.host}:{group.port}"],
        env=os.environ | ({"CUDA_VISIBLE_DEVICES": visible(1, 1)} if backend == "nccl" else {}),
        stdout=subprocess.PIPE,
    ) as peer:
        try:
            sender.join(2)
            assert peer.stdout is not None
            while not peer.stdout.readline().startswith(JOINED):
                assert peer.poll() is None, "the other end did not join"
            weights = [
                torch.zeros(m.shape, dtype=torch.bfloat16, device=place.device) for m in described
            ]
            ended: list[float] = []

            def send() -> None:
                try:
                    sender.send(described, weights)
                    place.synchronize()
                except RuntimeError as e:
                    print(f"the send ended: {e}", flush=True)
                ended.append(time.monotonic())

            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            time.sleep(1.0)
            began = time.monotonic()
            peer.send_signal(signal.SIGKILL)
            sender.leave()
            thread.join(TIMEOUT_S + ABORT_S)
        finally:
            peer.kill()
    assert ended, f"{backend}: the send still waits {TIMEOUT_S + ABORT_S:.0f} s after its end died"
    seconds = ended[0] - began
    record(backend, seconds=seconds)
    assert seconds >= 0, "the send was over before its end was killed"
    assert backend == "gloo" or seconds <= ABORT_S, f"the send came back after {seconds:.1f} s"


def stand_by(backend: str, address: str) -> None:
    """Join as the one worker of an engine, and never take what is sent."""
    host, port = address.rsplit(":", 1)
    store = join_store(host, int(port), TIMEOUT_S)
    join = {"gloo": gloo_group, "nccl": NcclGroup}[backend]
    joined = join(store, rank=1, world=2, timeout_s=TIMEOUT_S)
    print(JOINED.decode(), joined, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    stand_by(*sys.argv[1:])
