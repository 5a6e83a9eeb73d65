"""A bare vLLM engine in its own process, one after another; `test_families.py` starts it. A tiny
one is up in a second or two, where an actor with an engine of its own takes twenty."""

import asyncio
import os
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from async_opd.core.lora import LoraConfig
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.rollout.engine_args import places_for
from async_opd.roles.weight_sync import vllm_updates
from async_opd.roles.weight_sync.adapter import ADAPTER
from async_opd.roles.weight_sync.receiver import ENGINES
from tests.nccl_over_gloo import PLUGIN, play

_engines: list[LLM] = []
_under: list[LoRARequest] = []  # what it samples under


class Client:
    """The engine, as what awaits its answers knows it."""

    async def collective_rpc(self, method: str, args: tuple) -> list:
        return _engines[0].collective_rpc(method, args=args)

    async def update_weight_version(self, version: str) -> None:
        _engines[0].llm_engine.engine_core.set_weight_version(version)


CLIENT: Any = Client()


def start(model: str, backend: str, workers: int = 1, lora: LoraConfig | None = None) -> None:
    """Replace the engine by a new one with the weights of `model`, in this process or in so many
    beside it; with a place for an adapter where there is a `lora`."""
    stop()
    if backend == "nccl":
        play()
    beside: dict[str, Any] = {}
    if workers > 1:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        sys.path.append(f"{PLUGIN}")  # they have the same
        beside = {"distributed_executor_backend": "mp", "tensor_parallel_size": workers}
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
            worker_extension_cls="async_opd.roles.rollout.vllm_candidates.Candidates",
            **cpu_engine(1, enforce_eager=True) | beside,
            **(places_for(lora, model) if lora else {}),
        )
    ]
    _under[:] = [ADAPTER] if lora else []
    if lora:
        _engines[0].collective_rpc("begin_adapter")


def stop() -> None:
    """Stop the engine: this process waits at its own end for those it started."""
    while _engines:
        _engines.pop().llm_engine.engine_core.shutdown()


def join(group: WeightGroup) -> None:
    """Join the weight group."""
    asyncio.run(vllm_updates.join(CLIENT, group))


def update(layout: WeightLayout) -> None:
    """Take one update."""
    asyncio.run(vllm_updates.take(CLIENT, 1, layout))
    _engines[0].reset_prefix_cache()


def refuse_next_adapter() -> None:
    """Have the second worker raise when it has taken the adapter before from its place."""

    def change(worker: Any) -> None:
        manager = worker.model_runner.model.lora_manager
        add = manager.add_adapter

        def refuse(_: Any) -> None:
            manager.add_adapter = add
            raise MemoryError("no room")

        if worker.rank == 1:
            manager.add_adapter = refuse

    _engines[0].collective_rpc(change)


def places() -> int:
    """The bytes that the engine in this process has for adapters."""

    def count(worker: Any) -> int:
        stacked = (
            getattr(module, f"lora_{half}_stacked", ())
            for module in worker.model_runner.model.modules()
            for half in "ab"
        )
        return sum(tensor.nbytes for tensors in stacked for tensor in tensors)

    return _engines[0].collective_rpc(count)[0]


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
        .generate(
            [{"prompt_token_ids": prompt_ids}],
            sampling,
            use_tqdm=False,
            lora_request=next(iter(_under), None),
        )[0]
        .outputs[0]
    )
    return list(output.token_ids), list(output.logprobs.logprobs)
