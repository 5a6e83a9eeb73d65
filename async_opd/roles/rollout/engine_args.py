"""Arguments of vLLM's engines: those of a generator, and what any role's table of the config has in
their place."""

import os
import shutil
from copy import deepcopy
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import WeightTransferConfig
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from async_opd.core.errors import ConfigError
from async_opd.core.foreign import foreign
from async_opd.core.lora import LoraConfig
from async_opd.core.precision import dtype_on
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Needs
from async_opd.roles.learner.lora import targets
from async_opd.roles.models import causal_lm
from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.weight_sync.receiver import ENGINES


def engine_args(
    settings: GeneratorSettings, config: RolloutConfig, needs: Needs, *, longest: int, block: int
) -> AsyncEngineArgs:
    """What vLLM takes for sequences of at most `longest` tokens, with a prefix cache of blocks of
    `block` tokens, and what the config's table has in its place. Raises ConfigError where it would
    be compiled and there is no compiler, and where vLLM refuses the table."""
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
    lora = settings.lora
    adapter = places_for(lora, settings.model, settings.trust_remote_code) if lora else {}
    ours = dict(
        model=settings.model,
        dtype=dtype_on(not cpu, config.dtype),
        seed=settings.seed,
        max_model_len=longest,
        max_num_seqs=config.concurrency,
        max_num_batched_tokens=prefilled_at_once(
            ranks=config.tensor_parallel_size, longest=longest, sequences=config.concurrency
        ),
        block_size=block,
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        weight_transfer_config=WeightTransferConfig(backend=ENGINES[settings.backend]),
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
        **adapter,
    )
    return with_table("teacher" if settings.as_teacher else "rollout", ours, config.engine)


def places_for(lora: LoraConfig, model: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """What vLLM takes to have places for one adapter of `model`: as wide as the next of its ranks,
    beside the layers that have one. It knows these by the last part of their names, and takes one
    that it makes of several for all. Raises ConfigError as `targets`."""
    called = f"model {model}"
    lm = causal_lm.read(
        called, model, "float32", trust_remote_code=trust_remote_code, weights=False
    )
    return dict(
        enable_lora=True,
        max_loras=1,
        max_lora_rank=lora.engine_rank,
        lora_target_modules=sorted({n.rpartition(".")[2] for n in targets(lm, lora, called)}),
    )


def pin_runner(*, patched: bool) -> None:
    """Choose the model runner of this process's engines, whatever the environment of a job says:
    vLLM's second, which takes a prompt's log-probs in pieces, but its first where `patched` by
    `vllm_candidates`, and on CPU, where it has no other."""
    first = patched or current_platform.is_cpu()
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0" if first else "1"


def prefilled_at_once(*, ranks: int, longest: int, sequences: int) -> int | None:
    """How many tokens a step of an engine takes: as many as vLLM's own server would on this card,
    8,192 on one of 80 GB; None on CPU, for what it takes by itself."""
    if current_platform.is_cpu():
        return None
    tokens, _ = AsyncEngineArgs.get_batch_defaults(ranks)
    return min(tokens[UsageContext.OPENAI_API_SERVER], longest * sequences)


def with_table(section: str, ours: dict[str, Any], table: dict[str, Any]) -> AsyncEngineArgs:
    """Make an engine's arguments, those of the table [section.engine] in the place of `ours`, and
    have vLLM check how they go together. Raises ConfigError with what it says of the table."""
    if table:
        with foreign(f"{section}.engine = {table!r}: refused by vLLM", ConfigError):
            AsyncEngineArgs(**ours | deepcopy(table)).create_engine_config()
    return AsyncEngineArgs(**ours | table)
