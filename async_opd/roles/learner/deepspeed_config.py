"""The learner's settings as DeepSpeed's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from async_opd.core.errors import ConfigError, first_line
from async_opd.roles.learner.config import LearnerConfig


def deepspeed_config(config: LearnerConfig, hidden_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` takes for a model of that hidden size."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "stage3_param_persistence_threshold": 10 * hidden_size,  # norms and biases
    }
    on_gpus = torch.cuda.is_available()
    if config.zero_stage == 2 and config.ranks > 1 and on_gpus:
        # Gradients are reduced while others are computed. DeepSpeed allows it to nothing else where
        # the plan decides how many micro-batches there are; stage 3 does so by itself.
        zero["overlap_comm"] = True
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpus}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # the plan decides how many micro-batches make a step
        "managed_gradient_accumulation": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "weight_decay": config.weight_decay,
                # DeepSpeed's own are compiled on first use, two minutes long, with compilers that
                # may be absent; on a host torch's fused one is as fast: benchmarks/README.md
                "torch_adam": True,
                **({"fused": True} if config.offload_optimizer else {}),
            },
        },
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # over micro-batches, whatever the weights are
        # absent, it would be 1.0
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,
    }
    table = config.deepspeed  # which has none of what is above but `zero_optimization`
    return ours | table | {"zero_optimization": zero | table.get("zero_optimization", {})}


@contextmanager
def refused(table: dict[str, Any]) -> Iterator[None]:
    """Raise ConfigError where DeepSpeed does not take what the table `learner.deepspeed` asks
    for."""
    try:
        yield
    except (AssertionError, ValueError) as e:
        if not table:
            raise
        line = f"learner.deepspeed = {table!r}: refused by DeepSpeed: {first_line(e)}"
        raise ConfigError(line) from e
