"""The learner's side of a weight update: rank 0 of one group over all generators' workers."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work

from async_opd.core.errors import DataError
from async_opd.core.weights import WeightGroup
from async_opd.roles.weight_sync.gloo import (
    TensorMeta,
    broadcast,
    buckets,
    gloo_group,
    open_store,
)
from async_opd.roles.weight_sync.nccl import NcclGroup


class Sender(ABC):
    """Rank 0 of a weight group, which the others join in a store at `host` and `port`."""

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        self._store = open_store(host, timeout_s)
        self.host, self.port = host, self._store.port
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s

    def group(self, rank_offset: int, world: int) -> WeightGroup:
        """Where the workers of one generator join."""
        return WeightGroup(
            host=self.host,
            port=self.port,
            rank_offset=rank_offset,
            world=world,
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
        )

    @abstractmethod
    def join(self, world: int) -> None:
        """Wait until every worker has joined, at most the timeout. Raises RuntimeError."""

    @abstractmethod
    def send(self, described: Sequence[TensorMeta], weights: Iterable[Tensor]) -> None:
        """Broadcast `weights`, which are `described`. Raises RuntimeError where a member is gone or
        slow, DataError where a weight is not what is described."""

    @abstractmethod
    def leave(self) -> None:
        """End the group, whatever goes on in it. May be called from another thread, and again."""


def checked(described: Sequence[TensorMeta], weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Give the weights one by one, each only if it is what the members were told to expect: they
    cut what arrives into weights by that. Raises DataError naming the first that is not."""
    left = iter(weights)
    for meta in described:
        weight = next(left, None)
        if weight is None:
            raise DataError(f"student.model: {meta.name} is described, but not there to be sent")
        dtype, shape = str(weight.dtype).removeprefix("torch."), tuple(weight.shape)
        if (dtype, shape) != (meta.dtype, tuple(meta.shape)):
            raise DataError(
                f"student.model: {meta.name} is {dtype} {list(shape)}, but described to the"
                f" generators as {meta.dtype} {list(meta.shape)}"
            )
        yield weight
    if next(left, None) is not None:
        raise DataError("student.model: more weights are there to be sent than are described")


class GlooSender(Sender):
    """Broadcasts by way of host memory: for CPUs, and for GPUs without a common NCCL fabric."""

    _group: ProcessGroupGloo | None = None

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        super().__init__(host, bucket_bytes=bucket_bytes, timeout_s=timeout_s)
        self._flats: list[Tensor] = []

    def join(self, world: int) -> None:
        """Wait until every worker has joined, at most the timeout. Raises RuntimeError."""
        self._group = gloo_group(self._store, rank=0, world=world, timeout_s=self._timeout_s)

    def send(self, described: Sequence[TensorMeta], weights: Iterable[Tensor]) -> None:
        """Broadcast `weights`: one bucket travels while the next is gathered and copied.

        Two buckets of host memory, made at the first call, are all the memory it adds.
        """
        group = self._group
        assert group is not None, "send without join"
        left = checked(described, weights)
        travelling: deque[Work] = deque()
        planned = list(buckets(described, self._bucket_bytes))
        if not self._flats:
            largest = max(sum(meta.nbytes for meta in bucket) for bucket in planned)
            self._flats = [torch.empty(largest, dtype=torch.uint8) for _ in planned[:2]]
        for turn, bucket in enumerate(planned):
            if len(travelling) == 2:
                travelling.popleft().wait()
            flat = self._flats[turn % 2][: sum(meta.nbytes for meta in bucket)].view(
                getattr(torch, bucket[0].dtype)
            )
            for part in flat.split([math.prod(meta.shape) for meta in bucket]):
                part.copy_(next(left).flatten())
            if turn == len(planned) - 1:
                next(left, None)  # none may be left
            travelling.append(broadcast(group, flat))
        for work in travelling:
            work.wait()

    def leave(self) -> None:
        """End the group once nobody uses it: each of its broadcasts has a bound of its own."""
        self._group = None


class NcclSender(Sender):
    """Broadcasts GPU to GPU, in vLLM's packed chunks."""

    _group: NcclGroup | None = None

    def join(self, world: int) -> None:
        """Wait until every worker has joined, at most the timeout. Raises RuntimeError."""
        self._group = NcclGroup(self._store, rank=0, world=world, timeout_s=self._timeout_s)

    def send(self, described: Sequence[TensorMeta], weights: Iterable[Tensor]) -> None:
        """Broadcast `weights`, at most the timeout in all: it is packed on streams of its own,
        which wait for nobody, so this thread's stream comes to its end before."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        group = self._group
        assert group is not None, "send without join"
        torch.cuda.current_stream().synchronize()
        with group.bounded():
            packed_nccl_broadcast_producer(
                iterator=zip(
                    (meta.name for meta in described), checked(described, weights), strict=True
                ),
                group=group,
                src=0,
                post_iter_func=lambda item: item[1],
                buffer_size_bytes=self._bucket_bytes,
            )

    def leave(self) -> None:
        """Abort the communicator: a broadcast that hangs raises."""
        if self._group:
            self._group.destroy()


SENDERS: dict[str, type[Sender]] = {"gloo": GlooSender, "nccl": NcclSender}
