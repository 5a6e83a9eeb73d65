"""New weights put into a vLLM model that runs: by vLLM's layerwise reload, and what that leaves
out."""

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    LOADING_LAYERS,
    _place_kernel_tensors,
    get_layerwise_info,
    logger,
)

# at each update it warns of layers for which nothing comes: of a student with an adapter most, and
# a head that is tied
logger.setLevel(logging.ERROR)

# of experts whose weights may come, those they run by until then
_kernels: WeakKeyDictionary[UnquantizedFusedMoEMethod, Any] = WeakKeyDictionary()


def begin(model: nn.Module, device: torch.device) -> None:
    """Make `model` ready to take weights by its `load_weights`: all of them, or all of some of its
    layers. The others stay as they are."""
    if device.type == "cpu":
        _rebuild_experts(model)
    initialize_layerwise_reload(model)


def finish(model: nn.Module, model_config: ModelConfig) -> None:
    """Rebuild the kernels' tensors. A tied LM head gets no weights of its own, so the reload puts
    back the copy that the CPU kernel packed at load time; repacking it from the live weight is
    harmless where it is untied."""
    finalize_layerwise_reload(model, model_config)
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is None:
            method.moe_kernel = _kernels.get(method)  # none has been built: no weights came
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def break_off(model: nn.Module) -> None:
    """Forget a reload that is not to be finished, so that another may `begin`: vLLM's own skips the
    layers that are half loaded, keeps what they have counted, and takes them for whole a shard too
    early.

    Each gets its own tensors back. Those that were whole already hold the weights that came, or,
    where a communicator was aborted meanwhile, anything: until a later reload is finished `model`
    must not be used. May be called where none has begun.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
        info.reset()
    LOADING_LAYERS.clear()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload


def _rebuild_experts(model: nn.Module) -> None:
    """Let the reload build the experts' kernels anew: it keeps one that is there, and on CPUs it
    then leaves out to pack the weights, so that the logits are silently wrong (by 8 nats on a
    random model)."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            _kernels[method], method.moe_kernel = method.moe_kernel, None
