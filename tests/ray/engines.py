"""Bare vLLM engines, one after another in one process that `test_families.py` starts: a tiny one is up in a second or
two, where an actor with an engine of its own takes twenty."""

from concurrent.futures import ThreadPoolExecutor

from async_opd.rollout.generator import RequestOutputKind, SamplingParams  # sets what vLLM reads when it is imported

from vllm import LLM  # isort: skip
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

_engines: list[LLM] = []


def start(model: str, count: int) -> None:
    """Replace the engines by `count` new ones with the weights of `model`."""
    for engine in _engines:
        engine.llm_engine.engine_core.shutdown()
    _engines[:] = [
        LLM(
            model, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, block_size=128,
            max_num_seqs=8, logprobs_mode="processed_logprobs", disable_log_stats=True, seed=seed,
            weight_transfer_config=WeightTransferConfig(backend="gloo"),
        )
        for seed in range(count)
    ]  # fmt: skip


def join(infos: list[dict]) -> None:
    """Join the weight group."""
    _each(lambda engine, info: engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)), infos)


def update(info: dict) -> None:
    """Take one update."""

    def take(engine: LLM) -> None:
        engine.start_weight_update()
        engine.update_weights(WeightTransferUpdateRequest(update_info=info))
        engine.finish_weight_update()
        engine.reset_prefix_cache()

    _each(take)


def sample(prompt_ids: list[int], tokens: int) -> list[tuple[list[int], list[float]]]:
    """Each engine's fresh sample after the prompt, with its log-probs."""
    sampling = SamplingParams(
        max_tokens=tokens, ignore_eos=True, logprobs=0, flat_logprobs=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    outputs = [e.generate([{"prompt_token_ids": prompt_ids}], sampling, use_tqdm=False)[0].outputs[0] for e in _engines]
    return [(list(output.token_ids), list(output.logprobs.logprobs)) for output in outputs]


def _each(call, *columns) -> None:
    with ThreadPoolExecutor(len(_engines)) as pool:
        list(pool.map(call, _engines, *columns))
