"""The learner's side of a weight update: rank 0 of one group over all generators' workers."""

import math
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import Work

from async_opd.core.wire import WeightGroup
from async_opd.roles.weight_sync.gloo import (
    TensorMeta,
    broadcast,
    buckets,
    gloo_group,
    held_port,
    open_store,
)


class Sender:
    """Rank 0 of a weight group, before the others have joined."""

    def __init__(self, host: str, port: int, *, bucket_bytes: int, timeout_s: float):
        self.host, self.port = host, port
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


class GlooSender(Sender):
    """Broadcasts by way of host memory: for CPUs, and for GPUs without a common NCCL fabric."""

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        self._store = open_store(host, timeout_s)
        super().__init__(host, self._store.port, bucket_bytes=bucket_bytes, timeout_s=timeout_s)
        self._flats: list[Tensor] = []

    def join(self, world: int) -> None:
        """Wait until every worker has joined, at most the timeout."""
        self._group = gloo_group(self._store, rank=0, world=world, timeout_s=self._timeout_s)

    def send(self, described: list[TensorMeta], weights: Iterable[Tensor]) -> None:
        """Broadcast `weights`, which are `described`: one bucket travels while the next is gathered
        and copied.

        Two buckets of host memory, made at the first call, are all the memory it adds.
        """
        left = iter(weights)
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
            travelling.append(broadcast(self._group, flat))
        for work in travelling:
            work.wait()


class NcclSender(Sender):
    """Broadcasts GPU to GPU, packed, to vLLM's own `nccl` engine."""

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        self._held = held_port(host)  # vLLM listens there itself, once all are to join
        super().__init__(*self._held.getsockname(), bucket_bytes=bucket_bytes, timeout_s=timeout_s)

    def join(self, world: int) -> None:
        """Wait until every worker has joined."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        with self._held:
            self._group = trainer_init(
                dict(master_address=self.host, master_port=self.port, world_size=world)
            )

    def send(self, described: list[TensorMeta], weights: Iterable[Tensor]) -> None:
        """Broadcast `weights`, which are `described`, in vLLM's packed chunks."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=zip((meta.name for meta in described), weights, strict=True),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=self._bucket_bytes,
        )


SENDERS = {"gloo": GlooSender, "nccl": NcclSender}
