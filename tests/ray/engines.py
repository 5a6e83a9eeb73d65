"""A bare vLLM engine in its own process, one after another; `test_families.py` starts it. A tiny
one is up in a second or two, where an actor with an engine of its own takes twenty."""

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.sampling_params import RequestOutputKind

from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.weight_sync.receiver import ENGINES
from tests.nccl_over_gloo import play

_engines: list[LLM] = []


def start(model: str, backend: str) -> None:
    """Replace the engine by a new one with the weights of `model`."""
    stop()
    if backend == "nccl":
        play()
    _engines[:] = [
        LLM(
            model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=128,
            block_size=128,
            max_num_seqs=8,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=ENGINES[backend]),
            **cpu_engine(1, enforce_eager=True),
        )
    ]


def stop() -> None:
    """Stop the engine: this process waits at its own end for those it started."""
    while _engines:
        _engines.pop().llm_engine.engine_core.shutdown()


def join(info: dict) -> None:
    """Join the weight group."""
    _engines[0].init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))


def update(info: dict) -> None:
    """Take one update."""
    _engines[0].start_weight_update()
    _engines[0].update_weights(WeightTransferUpdateRequest(update_info=info))
    _engines[0].finish_weight_update()
    _engines[0].reset_prefix_cache()


def sample(prompt_ids: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """A fresh sample after the prompt, with its log-probs."""
    sampling = SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    output = (
        _engines[0]
        .generate([{"prompt_token_ids": prompt_ids}], sampling, use_tqdm=False)[0]
        .outputs[0]
    )
    return list(output.token_ids), list(output.logprobs.logprobs)
