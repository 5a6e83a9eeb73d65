"""The group that carries weights from the learner to the generators' workers by gloo: joined by both sides."""

import math
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore


@dataclass(frozen=True)
class TensorMeta:
    """Name in the checkpoint, dtype name ("float32") and shape of one weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def free_port(host: str) -> int:
    """A TCP port that is free on `host` (an address of this machine) right now."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def gloo_group(host: str, port: int, *, rank: int, world: int, timeout_s: float) -> ProcessGroupGloo:
    """Join a group of `world` members whose rank 0 listens at host:port; each collective is bounded by `timeout_s`.

    Traffic uses the interface that reaches `host`, so a group on one machine stays on loopback.
    Raises RuntimeError (torch's DistError) when the members do not meet in time.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        local = probe.getsockname()[0]
    options = ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=local)]
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world, options)


def buckets(metas: Iterable[TensorMeta], bucket_bytes: int) -> Iterator[list[TensorMeta]]:
    """Split weights, in order, into runs of one dtype and at most `bucket_bytes` (one larger weight goes alone)."""
    bucket: list[TensorMeta] = []
    for meta in metas:
        size = sum(m.nbytes for m in bucket)
        if bucket and (size + meta.nbytes > bucket_bytes or meta.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(meta)
    if bucket:
        yield bucket


def broadcast(group: ProcessGroupGloo, flat: Tensor) -> None:
    """Broadcast a flat CPU tensor from rank 0 in place, waiting at most the group's timeout."""
    group.broadcast([flat], torch.distributed.BroadcastOptions()).wait()
