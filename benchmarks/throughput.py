"""Trained tokens per second of the whole real stack on one fixed work, asynchronous and synchronous
in one run, and asynchronous with KV that updates leave as it is.

The work: prompts "a+b=" of two digits, vocabulary 128, Qwen3 student of 4 layers, width 128 (0.8 M,
tied), teacher of 6 layers and width 256 (4.7 M), random initial weights, fp32, 16 trajectories a
step of exactly 64 new tokens, temperature 1, top-k 8 forward KL, lr 1e-3, 40 steps. Rates are wall
time after the first 5 steps.

    python benchmarks/throughput.py --out throughput.json [--repeat 3] [--kv]

A pause is the time from the first call of an update to a generator until it runs on, mean over the
steps; what `sync.kv = "recompute"` then computes anew is in the tokens per second. With `--kv` only
the two kinds of it are run, in turn, on responses of 192 tokens, 32 trajectories a step.

The roles alone are held against the bare engines of `bare.py` on the same requests and batches, as
tokens per CPU-second of each role's processes. In the running loop they also update weights, and
share caches with each other.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from bare import IN_FLIGHT, PER_STEP, PROMPT, STEPS, TOKENS, WARM_UP, cpu_seconds
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from async_opd.config.load import load
from async_opd.config.schema import Config
from async_opd.core.ports import ScoredGroup
from async_opd.core.roles import Roles
from async_opd.core.vocabulary import Tokens, runs
from async_opd.driver.train import train
from async_opd.launch.new_run import environment
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.runtime.cluster import Cluster
from async_opd.telemetry.metrics import Meter

KINDS = ("recompute", "keep")  # of sync.kv
KV = ("rollout.max_new_tokens=192", "learner.trajectories_per_step=32")
RESULTS = (
    "trained_tokens_per_s",
    "scored_dropped",
    "discarded_share",
    "max_lag",
    "driver_cpu_ms_per_trajectory",
)
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
max_prompt_tokens = {prompt}
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
    """Models, tokenizer and prompts; returns the config's path. No end token: every response has
    full length."""
    torch.manual_seed(0)
    vocabulary = [*"0123456789+=", *(f"<{i}>" for i in range(116))]
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<0>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    for name, layers, width in (("student", 4, 128), ("teacher", 6, 256)):
        config = Qwen3Config(
            vocab_size=128,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=None,
            bos_token_id=None,
            dtype="float32",
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / name)
    pairs = ((a, b) for a in range(10, 100) for b in range(10, 100))
    rows = (json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in pairs)
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    settings = dict(folder=folder, steps=STEPS, tokens=TOKENS, per_step=PER_STEP, prompt=PROMPT)
    (folder / "work.toml").write_text(WORK.format(**settings))
    return folder / "work.toml"


GENERATOR, LEARNER = ("ray::Generator", "VLLM::EngineCore"), ("ray::Learner",)


async def run(config: Config) -> dict:
    """One run of the work; rates and core-seconds by process after the first steps."""
    prompts, tokenizer = _prompts(config)
    marks: dict[int, tuple[float, Counter[str]]] = {}
    rows: list[dict] = []

    def mark(row: dict) -> None:
        rows.append(row)
        if row["step"] in (WARM_UP, STEPS):
            marks[row["step"]] = (time.monotonic(), cpu_seconds())

    tokens = Tokens(student=runs(tokenizer.get_vocab().values()), eos_ids=())
    with Cluster(config, tokens=tokens, tokenizer=tokenizer.backend_tokenizer) as cluster:
        roles = await cluster.roles()
        gc.collect()
        gc.freeze()  # as `async_opd.launch.run` does
        with tempfile.TemporaryDirectory() as run_dir:
            summary = await train(config, roles, prompts, [], Path(run_dir), Meter([mark]))
    (began, cpu_before), (ended, cpu_after) = marks[WARM_UP], marks[STEPS]
    wall, cpu = (
        ended - began,
        {process: cpu_after[process] - cpu_before[process] for process in cpu_after},
    )
    trained = sum(row["tokens"] for row in rows[WARM_UP:])
    moments = [0.0, *(row["elapsed_s"] for row in rows)]
    pauses = [
        row["generators_syncing"] * (moment - before)
        for row, before, moment in zip(rows, moments, moments[1:], strict=False)
    ]
    generated = (
        sum(row["tokens"] + row["tokens_excluded"] for row in rows)
        + summary["scored_dropped"] * config.rollout.max_new_tokens
    )
    return {
        "bound": config.run.max_lag_steps,
        "kv": config.sync.kv,
        "pause_ms": 1000 * statistics.mean(pauses[WARM_UP:]),
        "kv_lag_mean": statistics.mean(row["kv_lag_mean"] for row in rows[WARM_UP:]),
        "trained_tokens_per_s": trained / wall,
        "scored_dropped": summary["scored_dropped"],
        "discarded_share": 1 - sum(row["tokens"] for row in rows) / generated,
        "max_lag": summary["max_lag_seen"],
        "driver_cpu_ms_per_trajectory": 1000
        * cpu["driver"]
        / ((STEPS - WARM_UP) * config.learner.trajectories_per_step),
        "wall_s": wall,
        "core_seconds": {
            process: round(seconds, 2) for process, seconds in cpu.items() if seconds >= 0.05
        },
    }


async def alone(config: Config) -> dict:
    """Tokens per CPU-second of the generator and of the learner, each with nothing else to share
    the machine with."""
    prompts, tokenizer = _prompts(config)
    source = iter(prompts)
    tokens = Tokens(student=runs(tokenizer.get_vocab().values()), eos_ids=())
    with Cluster(config, tokens=tokens, tokenizer=tokenizer.backend_tokenizer) as cluster:
        roles = await cluster.roles()
        await _generate(roles, source, WARM_UP * PER_STEP)
        before = cpu_seconds()
        requests = (STEPS - WARM_UP) * PER_STEP
        groups = await _generate(roles, source, requests)
        between = cpu_seconds()
        scored = await asyncio.gather(
            *(roles.teachers[""][0].score(group) for _, _, group in groups[:PER_STEP])
        )
        verdicts = await asyncio.gather(
            *(roles.verifier.check(group) for _, _, group in groups[:PER_STEP])
        )
        batch = [
            ScoredGroup(
                ticket=at,
                prompt=prompt,
                meta=meta,
                group=group,
                scores=scores,
                verdicts=verdict,
                samples=(0,),
                since=0,
            )
            for at, ((prompt, meta, group), (_, scores), verdict) in enumerate(
                zip(groups, scored, verdicts, strict=False)
            )
        ]
        for step in range(STEPS):
            if step == WARM_UP:
                started = cpu_seconds()
            await roles.learner.step(batch)
        after = cpu_seconds()
    tokens = requests * TOKENS
    return {
        "generation": tokens / sum(between[process] - before[process] for process in GENERATOR),
        "learner": tokens / sum(after[process] - started[process] for process in LEARNER),
    }


async def _generate(roles: Roles, prompts, count: int) -> list:
    permits = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> tuple:
        async with permits:
            prompt = next(prompts)
            return prompt, *await roles.generators[0].generate(prompt)

    return await asyncio.gather(*(one() for _ in range(count)))


def _prompts(config: Config) -> tuple[PromptSource, PreTrainedTokenizerFast]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.student.model)
    return PromptSource(config.data, tokenizer, seed=0), tokenizer


def bare(engine: str, folder: Path) -> float:
    """Tokens per CPU-second of a bare engine in a process of its own."""
    command = [sys.executable, Path(__file__).with_name("bare.py"), engine, folder]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def limits(result: dict) -> str:
    """What a run spent its time on: the share of the cores that were busy, and who used most of
    them."""
    cpu = Counter(result["core_seconds"])
    share = cpu.total() / (result["wall_s"] * os.cpu_count())
    most = ", ".join(
        f"{process} {seconds / cpu.total():.0%}" for process, seconds in cpu.most_common(3)
    )
    return (
        f"{'CPU' if share > 0.8 else 'waiting'}: {share:.0%} of {os.cpu_count()} cores busy; {most}"
    )


def of_kv(repeat: int) -> dict:
    """Pauses and rates of both kinds of sync.kv at bound 4, in turn, and the ratio of each pair."""
    ratios: list[float] = []
    raw: list[dict] = []
    print(f"{'kv':>10} {'trained tok/s':>14} {'pause ms':>9} {'kv lag':>7}  limited by")
    with tempfile.TemporaryDirectory() as name:
        work = make_work(Path(name))
        for _ in range(repeat):
            pair = [asyncio.run(run(load(work, [*KV, f"sync.kv={kv}"]))) for kv in KINDS]
            for one in pair:
                print(
                    f"{one['kv']:>10} {one['trained_tokens_per_s']:>14.0f} {one['pause_ms']:>9.1f}"
                    f" {one['kv_lag_mean']:>7.3f}  {limits(one)}"
                )
            recompute, keep = (one["trained_tokens_per_s"] for one in pair)
            ratios.append(keep / recompute)
            raw += pair
    print(f"keep_over_recompute: {statistics.median(ratios):.3f}")
    return {"keep_over_recompute": statistics.median(ratios), "raw": raw}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument(
        "--repeat", type=int, default=1, help="repetitions of each measurement, in turn"
    )
    parser.add_argument("--kv", action="store_true", help="only compare the kinds of sync.kv")
    args = parser.parse_args()
    if args.kv:
        args.out.write_text(json.dumps(of_kv(args.repeat) | {"seed": 0} | environment(), indent=2))
        return
    raw: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = make_work(folder)
        for _ in range(args.repeat):
            pair = [
                asyncio.run(run(load(work, [f"run.max_lag_steps={bound}"]))) for bound in (4, 0)
            ]
            # it trains on one batch again
            roles = asyncio.run(alone(load(work, [f"run.max_lag_steps={STEPS}"])))
            raw.append(
                {
                    "runs": pair,
                    "roles": roles,
                    "bare": {e: bare(e, folder) for e in ("vllm", "deepspeed")},
                }
            )

    def median(pick) -> float:
        return statistics.median(pick(repetition) for repetition in raw)

    result = {key: median(lambda r, key=key: r["runs"][0][key]) for key in RESULTS}
    result["async_over_sync"] = median(
        lambda r: r["runs"][0]["trained_tokens_per_s"] / r["runs"][1]["trained_tokens_per_s"]
    )
    result["generation_vs_bare_vllm"] = median(
        lambda r: r["roles"]["generation"] / r["bare"]["vllm"]
    )
    result["learner_vs_bare_deepspeed"] = median(
        lambda r: r["roles"]["learner"] / r["bare"]["deepspeed"]
    )
    print(
        f"{'bound':>6} {'trained tok/s':>14} {'largest lag':>12} {'dropped':>8} {'driver ms':>10} "
        " limited by"
    )
    for one in (one for repetition in raw for one in repetition["runs"]):
        print(
            f"{one['bound']:>6} {one['trained_tokens_per_s']:>14.0f} {one['max_lag']:>12}"
            f" {one['scored_dropped']:>8} {one['driver_cpu_ms_per_trajectory']:>10.2f} "
            f" {limits(one)}"
        )
    for key in ("async_over_sync", "generation_vs_bare_vllm", "learner_vs_bare_deepspeed"):
        print(f"{key}: {result[key]:.2f}")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    args.out.write_text(
        json.dumps(result | {"seed": 0, "hardware": hardware, "raw": raw} | environment(), indent=2)
    )


if __name__ == "__main__":
    main()
