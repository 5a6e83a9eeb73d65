"""vLLM's side of a weight update by gloo: a weight-transfer engine registered through vLLM's plugin
entry point."""

import math
import multiprocessing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from async_opd.roles.verifier.sandbox.namespaces import die_with
from async_opd.roles.weight_sync.gloo import TensorMeta, broadcast, buckets, gloo_group, join_store


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where this generator's workers join: their ranks start at `rank_offset`, rank 0 is the
    learner."""

    host: str
    port: int
    rank_offset: int
    world: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """Weights of one update, in the order in which the learner sends them."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives every byte before it touches the model, so an update that fails leaves the old
    version serving."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: ProcessGroupGloo | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the learner's group, replacing the one of an earlier epoch."""
        self._init = init_info
        parallel = self.parallel_config
        self._group = gloo_group(
            join_store(init_info.host, init_info.port, init_info.timeout_s),
            rank=init_info.rank_offset
            + parallel.data_parallel_index * parallel.world_size
            + parallel.rank,
            world=init_info.world,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Nothing yet: from here to the last received byte the model must stay whole."""

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Receive all weights into host memory, then load them layer by layer."""
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
        if self.device.type == "cpu":
            self._rebuild_experts()
        initialize_layerwise_reload(self.model)
        model: Any = self.model  # of any of vLLM's classes
        model.load_weights(
            (meta.name, part.view(meta.shape).to(self.device))
            for bucket, parts, _ in arriving
            for meta, part in zip(bucket, parts, strict=True)
        )

    def finish_weight_update(self) -> None:
        """Rebuild the kernels' tensors. A tied LM head gets no weights of its own, so the reload
        puts back the copy that the CPU kernel packed at load time; repacking it from the live
        weight is harmless where it is untied."""
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def _rebuild_experts(self) -> None:
        """Let the reload build the experts' kernels anew: it keeps one that is there, and on CPUs
        it then leaves out to pack the weights, so that the logits are silently wrong (by 8 nats on
        a random model)."""
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in every process of an engine, perhaps more
    than once. One that has a parent, the engine's core or a worker of its, ends with that: the core
    outlives its actor otherwise, deaf to SIGTERM. The kernel sees to it, for the thread that starts
    them is the parent's main one."""
    if (parent := multiprocessing.parent_process()) and parent.pid:
        die_with(parent.pid)
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
