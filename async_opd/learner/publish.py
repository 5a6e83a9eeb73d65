"""The learner's side of a weight update: rank 0 of one group over all generators' workers."""

import torch
from torch import nn

from async_opd.collective import TensorMeta, broadcast, buckets, free_port, gloo_group


def metas(module: nn.Module) -> list[TensorMeta]:
    """What an update carries, in order. Tied weights appear once, under the name of the first."""
    return [
        TensorMeta(name, str(p.dtype).removeprefix("torch."), tuple(p.shape)) for name, p in module.named_parameters()
    ]


class GlooSender:
    """Broadcasts by way of host memory: for CPUs, and for GPUs without a common NCCL fabric."""

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        self.host, self.port = host, free_port(host)
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s

    def init_info(self, rank_offset: int, world: int) -> dict:
        """What vLLM's `init_weight_transfer_engine` gets on one generator."""
        return dict(
            host=self.host,
            port=self.port,
            rank_offset=rank_offset,
            world=world,
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
        )

    def join(self, world: int) -> None:
        """Wait until every worker has joined, at most the timeout."""
        self._group = gloo_group(self.host, self.port, rank=0, world=world, timeout_s=self._timeout_s)

    def send(self, module: nn.Module) -> None:
        """Broadcast every weight, one bucket at a time: one bucket is all the memory it adds."""
        params = dict(module.named_parameters())
        for bucket in buckets(metas(module), self._bucket_bytes):
            flat = torch.cat([params[meta.name].detach().flatten() for meta in bucket]).cpu()
            broadcast(self._group, flat)


class NcclSender:
    """Broadcasts GPU to GPU, packed, to vLLM's own `nccl` engine."""

    def __init__(self, host: str, *, bucket_bytes: int, timeout_s: float):
        self.host, self.port = host, free_port(host)
        self._bucket_bytes = bucket_bytes

    def init_info(self, rank_offset: int, world: int) -> dict:
        """What vLLM's `init_weight_transfer_engine` gets on one generator."""
        return dict(
            master_address=self.host,
            master_port=self.port,
            rank_offset=rank_offset,
            world_size=world,
            packed=True,
            packed_buffer_size_bytes=self._bucket_bytes,
        )

    def join(self, world: int) -> None:
        """Wait until every worker has joined."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init(dict(master_address=self.host, master_port=self.port, world_size=world))

    def send(self, module: nn.Module) -> None:
        """Broadcast every weight in vLLM's packed chunks."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=((name, p.detach()) for name, p in module.named_parameters()),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=self._bucket_bytes,
        )


SENDERS = {"gloo": GlooSender, "nccl": NcclSender}
