"""The engines without async-opd, on the requests and batches of `throughput.py`; it runs each in a
process of its own.

    python benchmarks/bare.py vllm FOLDER       tokens per CPU-second of AsyncLLM, `IN_FLIGHT`
                                                requests at a time
    python benchmarks/bare.py deepspeed FOLDER  tokens per CPU-second of a forward, backward,
                                                step loop

Each prints one number. FOLDER holds the `student` and `teacher` that `throughput.py` makes.
"""

import asyncio
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

PER_STEP, TOKENS, PROMPT, IN_FLIGHT = 16, 64, 6, 80
WARM_UP, STEPS = 5, 40
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process and of everything it started, by the processes' names."""
    here = psutil.Process()
    spent = Counter({"driver": sum(here.cpu_times()[:2])})
    for process in here.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            spent[process.cmdline()[0].split("/")[-1]] += sum(process.cpu_times()[:2])
    return spent


async def vllm(folder: Path) -> float:
    """Prompts of `PROMPT` tokens, `TOKENS` sampled with their log-probs, on an engine set up as the
    generator's."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder / "student"),
            dtype="float32",
            max_model_len=256,
            block_size=128,
            max_num_seqs=256,
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            distributed_executor_backend="uni",
        )
    )
    sampling = SamplingParams(
        max_tokens=TOKENS,
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    permits = asyncio.Semaphore(IN_FLIGHT)

    async def request(at: int) -> None:
        async with permits:
            prompt = {
                "prompt_token_ids": [1 + at % 9, at % 10, 10, 1 + at // 10 % 9, at // 90 % 10, 11]
            }
            async for output in engine.generate(prompt, sampling, f"{at}"):
                assert len(output.outputs[0].token_ids) == TOKENS

    await asyncio.gather(*map(request, range(WARM_UP * PER_STEP)))
    before = cpu_seconds().total()
    requests = (STEPS - WARM_UP) * PER_STEP
    await asyncio.gather(*map(request, range(requests)))
    rate = requests * TOKENS / (cpu_seconds().total() - before)
    engine.shutdown()
    return rate


def deepspeed(folder: Path) -> float:
    """Top-8 forward KL on equally long sequences, so that a plain padded batch wastes nothing."""
    import deepspeed
    import torch
    from transformers import Qwen3ForCausalLM

    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    student = Qwen3ForCausalLM.from_pretrained(folder / "student")
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": adam, "gradient_clipping": 1.0}
    engine, *_ = deepspeed.initialize(
        model=student,
        model_parameters=student.parameters(),
        config=settings,
        dist_init_required=False,
    )
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (PER_STEP, PROMPT + TOKENS), generator=random)
    top = torch.log_softmax(torch.randn(PER_STEP, TOKENS, 128, generator=random), -1).topk(8)
    for step in range(STEPS):
        if step == WARM_UP:
            before = cpu_seconds().total()
        logp = torch.log_softmax(
            engine(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1], -1
        )
        loss = (top.values.exp() * (top.values - logp.gather(-1, top.indices))).sum(-1).mean()
        engine.backward(loss)
        engine.step()
        assert torch.isfinite(loss)
    return (STEPS - WARM_UP) * PER_STEP * TOKENS / (cpu_seconds().total() - before)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    what, folder = sys.argv[1], Path(sys.argv[2])
    print(asyncio.run(vllm(folder)) if what == "vllm" else deepspeed(folder))
    os._exit(0)  # engines leave noise behind at a regular exit, after the number
