"""The group that carries weights from the learner to the generators' workers by gloo: joined by
both sides."""

import math
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] torch's stubs do not export it
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] nor this
    Work,
)


@dataclass(frozen=True)
class TensorMeta:
    """Name in the checkpoint, dtype name ("float32") and shape of one weight."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Piece:
    """Parameters that go back to the checkpoint together (nearly always one), and what they become
    there."""

    parameters: tuple[str, ...]  # names in the model
    tensors: tuple[TensorMeta, ...]  # in the checkpoint

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.tensors)

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype


Item = TypeVar("Item", TensorMeta, Piece)  # what fills a bucket


def open_store(host: str, timeout_s: float) -> TCPStore:
    """Open the store where the members of a group meet: this process listens from now on, at `host`
    (an address of this machine) and there alone, where torch by itself would on every interface.
    The system chooses the store's `port`."""
    listening = socket.create_server((host, 0))
    return TCPStore(
        host,
        listening.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Reach the store that rank 0 has opened at host:port. Raises RuntimeError (torch's DistError)
    when it does not answer in time."""
    return TCPStore(host, port, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def gloo_group(store: TCPStore, *, rank: int, world: int, timeout_s: float) -> ProcessGroupGloo:
    """Join a group of `world` members that meet in `store`, which rank 0 has opened; each
    collective is bounded by `timeout_s`.

    Traffic uses the interface that reaches the store, so a group on one machine stays on loopback.
    Raises RuntimeError (torch's DistError) when the members do not meet in time.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((store.host, store.port))
        local = probe.getsockname()[0]
    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] no stub
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [ProcessGroupGloo.create_device(hostname=local)]
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world, options)


def buckets(items: Iterable[Item], bucket_bytes: int) -> Iterator[list[Item]]:
    """Split weights, in order, into runs of one dtype and at most `bucket_bytes` (one larger weight
    goes alone)."""
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
    """Start to broadcast a flat CPU tensor from rank 0 in place; `wait()` takes at most the group's
    timeout.

    Works of one group run in the order in which they were started, a few at a time.
    """
    return group.broadcast(  # pyright: ignore[reportAttributeAccessIssue] torch's stubs lack it
        [flat], torch.distributed.BroadcastOptions()
    )
