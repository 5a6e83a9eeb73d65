"""Weights on their way from the learner to an engine's workers, over CUDA streams and NCCL."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from async_opd.roles.weight_sync.gloo import TensorMeta
from async_opd.roles.weight_sync.sender import NcclSender
from tests.gpu.place import GIB, Place, Record

BUCKET = 256 * 2**20  # sync.bucket_mib's own
HOST = "127.0.0.1"
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
    sender = NcclSender(HOST, bucket_bytes=BUCKET, timeout_s=20.0)
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
