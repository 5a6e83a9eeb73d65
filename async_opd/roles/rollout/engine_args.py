"""The settings of a generator's engine."""

import os
import shutil
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import WeightTransferConfig
from vllm.platforms import current_platform

from async_opd.core.errors import ConfigError
from async_opd.core.precision import dtype_on
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Needs
from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.rollout.config import RolloutConfig


def engine_args(
    settings: GeneratorSettings, config: RolloutConfig, needs: Needs, *, longest: int, block: int
) -> AsyncEngineArgs:
    """What vLLM takes for sequences of at most `longest` tokens, with a prefix cache of blocks of
    `block` tokens. Raises ConfigError where it would be compiled and there is no compiler."""
    cpu = current_platform.is_cpu()
    if cpu and not config.enforce_eager and not shutil.which(os.environ.get("CXX", "g++")):
        raise ConfigError(
            "rollout.enforce_eager = false: compiling on CPU needs a C++ compiler; set it to true"
        )
    device: dict[str, Any] = (
        cpu_engine(config.memory_gib, enforce_eager=config.enforce_eager)
        if cpu
        else {"enforce_eager": config.enforce_eager}
    )
    return AsyncEngineArgs(
        model=settings.model,
        dtype=dtype_on(not cpu, config.dtype),
        seed=settings.seed,
        max_model_len=longest,
        max_num_seqs=config.concurrency,
        block_size=block,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weight_transfer_config=WeightTransferConfig(backend=settings.backend),
        logprobs_mode="processed_logprobs",
        max_logprobs=needs.teacher_at_student_ids,
        worker_extension_cls="async_opd.roles.rollout.vllm_candidates.Candidates",
        scheduling_policy="priority",  # in order of arrival, but for the probe and evaluations
        # end tokens and penalties of the checkpoint's own are not asked for
        generation_config="vllm",
        # it reads texts only to find those that end a response
        skip_tokenizer_init=not any(isinstance(stop, str) for stop in settings.stops),
        trust_remote_code=settings.trust_remote_code,
        disable_log_stats=True,
        **device,
    )
