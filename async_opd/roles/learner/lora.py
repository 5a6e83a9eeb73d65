"""A student's adapter: put beside its linear layers by peft, and merged into copies of their
weights. The model stays the object that it was, and so do its names, by which its weights leave."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from async_opd.core.errors import ConfigError
from async_opd.core.lora import LoraConfig
from async_opd.core.suggest import nearest, shown
from async_opd.core.wire import Needs
from async_opd.maths.logprobs import Read
from async_opd.roles.learner.batch import MicroBatch

LINEAR = (nn.Linear, Conv1D)
NAME = "default"  # peft's, of the only adapter that there is


class Adapter(NamedTuple):
    """What is trained beside one weight W, [O, I], or [I, O] where that is `transposed`."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float  # s, alpha ÷ rank
    transposed: bool

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Compute W + s · B A in float32, as a new tensor of the weight's dtype."""
        delta_OI = self.scaling * (self.b_OR.float() @ self.a_RI.float())
        delta = delta_OI.T if self.transposed else delta_OI
        return (weight.float() + delta).to(weight.dtype)


def targets(lm: PreTrainedModel, lora: LoraConfig, called: str) -> list[str]:
    """Name the layers of `lm`, which messages name by `called`, that get an adapter. Raises
    ConfigError for what is no linear layer of it, for the head, whose weight is read by itself,
    and for what peft takes for experts."""
    modules, head = dict(lm.named_modules()), lm.get_output_embeddings()
    linear = [n for n, m in modules.items() if isinstance(m, LINEAR) and m is not head]
    experts = _named_as_experts(lm, {_last(name) for name in linear})
    linear = [name for name in linear if _last(name) not in experts]
    if lora.target_modules == "all-linear":
        if not linear:
            raise ConfigError(f"student.lora: {called} has no linear layer but its head")
        return linear
    matched: dict[str, None] = {}
    for asked in lora.target_modules:
        names = [name for name in modules if name == asked or name.endswith(f".{asked}")]
        other = next((name for name in names if name not in linear), None)
        if names and other is None:
            matched |= dict.fromkeys(names)
            continue
        kind = "the head" if other and modules[other] is head else "no linear layer"
        if other and _last(other) in experts:
            kind = "by its name, for peft, one of the experts"
        short = sorted({_last(name) for name in linear})
        raise ConfigError(
            f"student.lora.target_modules = {shown(list(lora.target_modules))}: {asked!r} is"
            f" {kind} of {called}; linear layers are {', '.join(short) or 'none'}"
            f"{nearest(asked, [*short, *linear] if '.' in asked else short)}"
        )
    return list(matched)


def wrap(lm: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Put an adapter beside the layers of `lm` that `lora` names, the same on every rank for the
    same `seed`: A is random, B is 0. It alone requires gradients from now on, and is of the dtype
    of `lm`. Raises ConfigError as `targets`."""
    import peft  # which who trains no adapter does not wait for

    names = targets(lm, lora, f"model {lm.config.name_or_path}")
    modules: Any = dict(lm.named_modules())
    alpha: Any = lora.alpha or lora.rank  # an integer for peft, but where it is none
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=lm.config.name_or_path,
        r=lora.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=lora.dropout,
        target_modules=names if lora.target_modules == "all-linear" else [*lora.target_modules],
        fan_in_fan_out=isinstance(modules[names[0]], Conv1D),
    )
    # of no other device: to look at its random numbers is to start it, and to hold memory there
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, lm)


def trained(lm: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Name what an adapter of `lm` consists of, as peft's files do."""
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": parameter
        for name, parameter in lm.named_parameters()
        if parameter.requires_grad
    }


def plain(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Name the weights of `lm` as they are named without an adapter, and leave that out."""
    wrapped = tuple(f"{name}." for name in _wrapped(lm))
    parameters: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        layer = next((layer for layer in wrapped if name.startswith(layer)), "")
        rest = name.removeprefix(layer)
        if not layer:
            parameters[name] = parameter
        elif rest.startswith("base_layer."):
            parameters[layer + rest.removeprefix("base_layer.")] = parameter
    return parameters


def adapters(lm: PreTrainedModel) -> dict[str, Adapter]:
    """Find what is trained beside the weights of `lm`, by their names in `plain`."""
    return {
        f"{name}.weight": Adapter(
            module.lora_A[NAME].weight,
            module.lora_B[NAME].weight,
            module.scaling[NAME],
            module.fan_in_fan_out,
        )
        for name, module in _wrapped(lm).items()
    }


@torch.no_grad()
def base_sum(lm: PreTrainedModel) -> int:
    """Sum the bits of what this rank holds of the weights that stay as they are: another model has
    another sum."""
    held = (_held(weight) for weight in lm.parameters() if not weight.requires_grad)
    return sum(int(part.detach().flatten().view(torch.uint8).sum()) for part in held)


@contextmanager
def undropped(lm: PreTrainedModel) -> Iterator[None]:
    """Have the adapter of `lm` drop nothing inside, as it does where it samples."""
    dropouts = [layer.lora_dropout for layer in _wrapped(lm).values()]
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.train()


@contextmanager
def adapters_off(lm: PreTrainedModel) -> Iterator[None]:
    """Have `lm` be inside what it was without its adapter, its frozen base."""
    layers = list(_wrapped(lm).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


Reads = Callable[[MicroBatch, Needs], Read]


def one_mask(module: Reads, micros: list[MicroBatch], seed: Sequence[int]) -> Reads:
    """Have `module` drop the same of each of `micros` in every pass over it, by `seed` and its
    number: what is summed up before a step must be of the network that the step trains. Other
    random numbers go on as if none had been drawn."""
    seeds = np.random.SeedSequence(seed).generate_state(len(micros), np.uint64)
    by_micro = {id(micro): int(each) for micro, each in zip(micros, seeds, strict=True)}

    def read(micro: MicroBatch, needs: Needs) -> Read:
        with torch.random.fork_rng():
            torch.manual_seed(by_micro[id(micro)])
            return module(micro, needs)

    return read


def _wrapped(lm: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in lm.named_modules() if hasattr(module, "lora_A")}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _named_as_experts(lm: PreTrainedModel, kinds: set[str]) -> set[str]:
    """Find which of the `kinds` of layers, by the last part of their names, are for peft the
    experts of `lm`: transformers had them under those names once. It would train these, which are
    no linear layers, in the place of what is named so."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_one(kind: str) -> bool:
        config = peft.LoraConfig(target_modules=[kind])
        try:
            convert_peft_config_for_transformers(config, model=lm, conversions=None)
        except ValueError:  # it wants those that are one weight now together
            return True
        return kind not in (config.target_modules or ())

    return {kind for kind in kinds if is_one(kind)}


def _held(weight: Any) -> Tensor:
    """What this rank holds of a weight: under ZeRO-3 its part, without what pads the last one,
    which nobody has written."""
    if not hasattr(weight, "ds_tensor"):
        return weight
    part = weight.ds_tensor
    before = part.numel() * weight.ds_zero_partition_rank
    return part[: max(weight.ds_numel - before, 0)]
