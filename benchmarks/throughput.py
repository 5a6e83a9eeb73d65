"""Trained tokens per second of the whole real stack on one fixed work, asynchronous and synchronous in one run.

The work: prompts "a+b=" of two digits, vocabulary 128, Qwen3 student of 4 layers, width 128 (0.8 M, tied), teacher of
6 layers and width 256 (4.7 M), random initial weights, fp32, 16 trajectories a step of exactly 64 new tokens,
temperature 1, top-k 8 forward KL, lr 1e-3, 40 steps. Rates are wall time after the first 5 steps.

    python benchmarks/throughput.py --out throughput.json [--repeat 3]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from async_opd.actors import Cluster
from async_opd.config import Config, load
from async_opd.metrics import Meter
from async_opd.rollout.prompts import PromptSource
from async_opd.run import environment
from async_opd.train import train

STEPS, WARM_UP, TOKENS, PER_STEP = 40, 5, 64, 16
WORK = """
[run]
dir = "{folder}/run"
steps = {steps}
[student]
model = "{folder}/student"
[teacher]
model = "{folder}/teacher"
[data]
path = "{folder}/prompts.jsonl"
max_prompt_tokens = 6
[rollout]
max_new_tokens = {tokens}
[learner]
trajectories_per_step = {per_step}
lr = 1e-3
[objective]
tag = "topk_kl"
k = 8
divergence = "forward"
"""


def make_work(folder: Path) -> Path:
    """Models, tokenizer and prompts; returns the config's path. No end token: every response has full length."""
    torch.manual_seed(0)
    vocabulary = [*"0123456789+=", *(f"<{i}>" for i in range(116))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<0>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    for name, layers, width in (("student", 4, 128), ("teacher", 6, 256)):
        config = Qwen3Config(
            vocab_size=128, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, head_dim=32,
            max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
            dtype="float32",
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / name)
    pairs = ((a, b) for a in range(10, 100) for b in range(10, 100))
    rows = (json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs)
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "work.toml").write_text(WORK.format(folder=folder, steps=STEPS, tokens=TOKENS, per_step=PER_STEP))
    return folder / "work.toml"


async def measure(config: Config, folder: Path) -> dict:
    """One run of the work; rates and driver CPU after the first steps."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.student.model)
    prompts = PromptSource(config.data, tokenizer, seed=0)
    marks: dict[int, tuple[float, float]] = {}
    rows: list[dict] = []

    def mark(row: dict) -> None:
        rows.append(row)
        marks[row["step"]] = (time.monotonic(), time.process_time())

    meter = Meter([mark])
    with Cluster(config, eos_ids=[], tokenizer=tokenizer.backend_tokenizer) as cluster:
        summary = await train(config, await cluster.roles(), iter(prompts), [], folder, meter)
    wall, cpu = (last - first for first, last in zip(marks[WARM_UP], marks[STEPS], strict=True))
    trained = sum(row["tokens"] for row in rows[WARM_UP:])
    generated = sum(row["tokens"] + row["tokens_excluded"] for row in rows) + summary["scored_dropped"] * TOKENS
    return {
        "max_lag_steps": config.run.max_lag_steps,
        "trained_tokens_per_s": trained / wall,
        "scored_dropped": summary["scored_dropped"],
        "discarded_share": 1 - summary["trained_tokens"] / generated,
        "max_lag": summary["max_lag_seen"],
        "driver_cpu_ms_per_trajectory": 1000 * cpu / ((STEPS - WARM_UP) * PER_STEP),
        "wall_s": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of each setting, in turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = make_work(Path(folder))
        raw = [
            asyncio.run(measure(load(work, [f"run.max_lag_steps={bound}"]), Path(folder)))
            for _ in range(args.repeat)
            for bound in (4, 0)
        ]

    def median(bound: int, key: str) -> float:
        return statistics.median(run[key] for run in raw if run["max_lag_steps"] == bound)

    result = {key: median(4, key) for key in raw[0] if key not in ("max_lag_steps", "wall_s")}
    result["async_over_sync"] = median(4, "trained_tokens_per_s") / median(0, "trained_tokens_per_s")
    print(f"{'bound':>6} {'trained tok/s':>14} {'largest lag':>12} {'dropped':>8} {'driver ms/trajectory':>21}")
    for run in raw:
        print(
            f"{run['max_lag_steps']:>6} {run['trained_tokens_per_s']:>14.0f} {run['max_lag']:>12} "
            f"{run['scored_dropped']:>8} {run['driver_cpu_ms_per_trajectory']:>21.2f}"
        )
    print(f"asynchronous over synchronous: {result['async_over_sync']:.2f}")
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "processor": platform.processor()}
    args.out.write_text(json.dumps(result | {"seed": 0, "hardware": hardware, "raw": raw} | environment(), indent=2))


if __name__ == "__main__":
    main()
