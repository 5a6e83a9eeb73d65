"""The group that carries weights from the learner to the generators' workers by gloo: joined by both sides."""

import math
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work


@dataclass(frozen=True)
class TensorMeta:
    """Name in the checkpoint, dtype name ("float32") and shape of one weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


class Sized(Protocol):
    """What fills a bucket."""

    dtype: str
    nbytes: int


Item = TypeVar("Item", bound=Sized)


def free_port(host: str) -> int:
    """A TCP port that is free on `host` (an address of this machine) right now."""
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def tcp_store(host: str, port: int, *, rank: int, world: int, timeout_s: float) -> TCPStore:
    """Where `world` members meet; rank 0 listens at host:port, and there alone: torch by itself would listen on every
    interface. Raises RuntimeError (torch's DistError) when rank 0 does not listen in time."""
    listening = socket.create_server((host, port)).detach() if rank == 0 else None
    return TCPStore(
        host,
        port,
        world,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def gloo_group(host: str, port: int, *, rank: int, world: int, timeout_s: float) -> ProcessGroupGloo:
    """Join a group of `world` members whose rank 0 listens at host:port; each collective is bounded by `timeout_s`.

    Traffic uses the interface that reaches `host`, so a group on one machine stays on loopback.
    Raises RuntimeError (torch's DistError) when the members do not meet in time.
    """
    timeout = timedelta(seconds=timeout_s)
    store = tcp_store(host, port, rank=rank, world=world, timeout_s=timeout_s)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        local = probe.getsockname()[0]
    options = ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=local)]
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world, options)


def buckets(items: Iterable[Item], bucket_bytes: int) -> Iterator[list[Item]]:
    """Split weights, in order, into runs of one dtype and at most `bucket_bytes` (one larger weight goes alone)."""
    bucket: list[Item] = []
    size = 0
    for item in items:
        if bucket and (size + item.nbytes > bucket_bytes or item.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(item)
        size += item.nbytes
    if bucket:
        yield bucket


def broadcast(group: ProcessGroupGloo, flat: Tensor) -> Work:
    """Start to broadcast a flat CPU tensor from rank 0 in place; `wait()` takes at most the group's timeout.

    Works of one group run in the order in which they were started, a few at a time.
    """
    return group.broadcast([flat], torch.distributed.BroadcastOptions())
