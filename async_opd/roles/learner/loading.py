"""The student as it comes from its checkpoint: whole, or weight by weight for ranks of which each
holds a part."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedModel

from async_opd.core.process_wide import environment
from async_opd.core.role_settings import LearnerSettings
from async_opd.roles.learner import lora
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.models import causal_lm

# Makes of a weight that is whole, in place, the part of it that this rank holds. Collective.
Shard = Callable[[nn.Parameter], None]
# One weight after the other, when its turn comes; else four threads read ahead of it.
IN_TURN = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}


def hidden_size(model: str, trust_remote_code: bool) -> int:
    """Read the width of the model, by which DeepSpeed's settings go, from its config."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return config.get_text_config(decoder=True).hidden_size


def load_student(
    settings: LearnerSettings, config: LearnerConfig, device: torch.device, shard: Shard | None
) -> PreTrainedModel:
    """Load the student, in the mode in which it learns, to `device`, with its adapter where it has
    one; where there is a `shard`, of each weight no more than what that leaves. Raises as
    `causal_lm.load`, but that packing is not yet tried out on what is sharded, and as
    `lora.wrap`."""
    assert config.dtype
    if shard is None:
        lm = causal_lm.load(
            settings.model, config.dtype, device, trust_remote_code=settings.trust_remote_code
        )
    else:
        lm = _sharded(settings, config.dtype, device, shard)
        lm.to(device)  # pyright: ignore[reportArgumentType]  # what is left are buffers
    lm.train()
    for module in lm.modules():  # the network that learns must be the one that sampled
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if settings.lora:
        lora.wrap(lm, settings.lora, settings.seed)
        if shard:
            for weight in lora.trained(lm).values():
                shard(weight)
    if config.gradient_checkpointing:
        # so that gradients reach what is recomputed also where the embeddings before it have none
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm


def _sharded(
    settings: LearnerSettings, dtype: str, device: torch.device, shard: Shard
) -> PreTrainedModel:
    """Load the student with each weight sharded as it takes its place, so that a rank never holds
    more than its parts and one whole weight. transformers itself reads, renames, fuses and ties
    them, in the same order on every rank."""
    sharded: dict[int, nn.Parameter] = {}  # by identity, which is theirs while they are held

    def arrived(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        # Of the files, not of a model that is made without data at first, nor made up for a missing
        # one, on each rank in an order of its own: that is refused, behind. A tied weight takes its
        # place twice, and to be sharded may be to take another, too.
        loaded = getattr(weight, "_is_hf_initialized", False)  # as transformers marks it
        if weight is not None and loaded and id(weight) not in sharded:
            sharded[id(weight)] = weight
            # of its own: files are mapped, and each page that a broadcast wrote would stay
            weight.data = weight.data.to(device, copy=True)
            shard(weight)

    hook = register_module_parameter_registration_hook(arrived)
    try:
        with environment(**IN_TURN):
            return causal_lm.read(
                f"model {settings.model}",
                settings.model,
                dtype,
                trust_remote_code=settings.trust_remote_code,
            )
    finally:
        hook.remove()
