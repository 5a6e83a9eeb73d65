"""vLLM's side of a weight update: weight-transfer engines registered through vLLM's plugin entry
point."""

import math
import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work
from vllm.config import ParallelConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

from async_opd.roles.verifier.sandbox.namespaces import die_with
from async_opd.roles.weight_sync import reload
from async_opd.roles.weight_sync.adapter import Adapters
from async_opd.roles.weight_sync.gloo import TensorMeta, broadcast, buckets, gloo_group, join_store
from async_opd.roles.weight_sync.nccl import NcclGroup

# What vLLM knows the engines below by, by `sync.backend`: it has an `nccl` of its own.
ENGINES = {"gloo": "async_opd_gloo", "nccl": "async_opd_nccl"}


@dataclass
class GroupInit(WeightTransferInitInfo):
    """Where this generator's workers join: their ranks start at `rank_offset`, rank 0 is the
    learner."""

    host: str
    port: int
    rank_offset: int
    world: int
    bucket_bytes: int
    timeout_s: float

    def rank(self, parallel: ParallelConfig) -> int:
        """That of the worker with these places."""
        return self.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """Weights of one update, in the order in which the learner sends them."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooEngine(Adapters, WeightTransferEngine[GroupInit, GlooUpdate]):
    """Receives every byte before it touches the model, so a broadcast that fails leaves the old
    version serving. On a GPU, too: each worker has room for the whole model in host memory."""

    init_info_cls = GroupInit
    update_info_cls = GlooUpdate
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GroupInit) -> None:
        """Join the learner's group, replacing the one of an earlier epoch."""
        self.shutdown()
        self._init = init_info
        self._group = gloo_group(
            join_store(init_info.host, init_info.port, init_info.timeout_s),
            rank=init_info.rank(self.parallel_config),
            world=init_info.world,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Nothing yet: from here to the last received byte the model must stay whole."""

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive all weights into host memory, then load them layer by layer."""
        arrived = self._arrived(update_info)
        model: Any = self.model  # of any of vLLM's classes
        with ExitStack() as broken:
            broken.callback(self.break_off)
            reload.begin(model, self.device)
            model.load_weights((name, weight.to(self.device)) for name, weight in arrived)
            broken.pop_all()

    def receive_adapter(self, update_info: GlooUpdate) -> dict[str, Tensor]:
        """Receive the tensors of an adapter into host memory, by their names."""
        return dict(self._arrived(update_info))

    def _arrived(self, update_info: GlooUpdate) -> Iterator[tuple[str, Tensor]]:
        """Receive every byte of an update; returns its tensors by their names, in host memory."""
        columns = zip(
            update_info.names, update_info.dtype_names, map(tuple, update_info.shapes), strict=True
        )
        group = self._group
        assert group is not None, "update without a group"
        arriving: list[tuple[list[TensorMeta], tuple[Tensor, ...], Work]] = []
        for bucket in buckets((TensorMeta(*column) for column in columns), self._init.bucket_bytes):
            elements = [math.prod(meta.shape) for meta in bucket]
            flat = torch.empty(sum(elements), dtype=getattr(torch, bucket[0].dtype))
            # all wait for the sender
            arriving.append((bucket, flat.split(elements), broadcast(group, flat)))
        for _, _, work in arriving:
            work.wait()
        return (
            (meta.name, part.view(meta.shape))
            for bucket, parts, _ in arriving
            for meta, part in zip(bucket, parts, strict=True)
        )

    def finish_weight_update(self) -> None:
        """Rebuild the kernels' tensors."""
        reload.finish(self.model, self.model_config)

    def break_off(self) -> None:
        """Make the model ready for another update, wherever the last one has ended."""
        reload.break_off(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class NcclEngine(Adapters, NCCLWeightTransferEngine):
    """vLLM's own engine over a group whose every wait ends. It loads what has come while the rest
    travels, so that after an update that fails the model holds weights of two versions, or worse:
    it must not serve until a later one has succeeded, and can take that."""

    init_info_cls: Any = GroupInit

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the learner's group (a `GroupInit`), replacing the one of an earlier epoch. Raises
        RuntimeError where it does not form in time."""
        self.shutdown()
        self.packed, self.packed_buffer_size_bytes = True, init_info.bucket_bytes
        group: Any = NcclGroup(
            join_store(init_info.host, init_info.port, init_info.timeout_s),
            rank=init_info.rank(self.parallel_config),
            world=init_info.world,
            timeout_s=init_info.timeout_s,
        )
        self.model_update_group = group

    def start_weight_update(self) -> None:
        """Make the model ready for weights of the checkpoint."""
        reload.begin(self.model, self.device)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive and load, at most the group's timeout. Raises RuntimeError where that is not
        enough; the group has then ended."""
        group: Any = self.model_update_group
        with ExitStack() as broken:
            broken.callback(self.break_off)
            broken.callback(self.shutdown)
            assert group is not None, "update without a group"
            with group.bounded():
                super().receive_weights(update_info)
            broken.pop_all()

    def receive_adapter(self, update_info: NCCLWeightTransferUpdateInfo) -> dict[str, Tensor]:
        """Receive the tensors of an adapter, by their names, at most the group's timeout. Raises
        RuntimeError where that is not enough; the group has then ended."""
        group: Any = self.model_update_group
        columns = zip(update_info.names, update_info.shapes, update_info.dtype_names, strict=True)
        arrived: dict[str, Tensor] = {}
        with ExitStack() as broken:
            broken.callback(self.shutdown)
            assert group is not None, "update without a group"
            with group.bounded():
                packed_nccl_broadcast_consumer(
                    iterator=(
                        (name, (shape, getattr(torch, dtype))) for name, shape, dtype in columns
                    ),
                    group=group,
                    src=0,
                    post_unpack_func=lambda some: arrived.update(
                        {name: tensor.cpu() for name, tensor in some}
                    ),
                    buffer_size_bytes=self.packed_buffer_size_bytes,
                    device=self.device,
                )
            broken.pop_all()
        return arrived

    def finish_weight_update(self) -> None:
        """Rebuild the kernels' tensors."""
        reload.finish(self.model, self.model_config)

    def break_off(self) -> None:
        """Make the model ready for another update, wherever the last one has ended; what it has
        put on any stream comes to its end before."""
        torch.accelerator.synchronize()
        reload.break_off(self.model)


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in every process of an engine, perhaps more
    than once. One that has a parent, the engine's core or a worker of its, ends with that: the core
    outlives its actor otherwise, deaf to SIGTERM. The kernel sees to it, for the thread that starts
    them is the parent's main one."""
    if (parent := multiprocessing.parent_process()) and parent.pid:
        die_with(parent.pid)
    for backend, engine in (("gloo", GlooEngine), ("nccl", NcclEngine)):
        if ENGINES[backend] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(ENGINES[backend], engine)
