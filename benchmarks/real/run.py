"""A real model from its first step to its export, by the commands that a user would type.

Heals the layer-pruned SmolLM2 (configs/smollm2_heal.toml), writes its report and export, measures
it before and after, then trains the whole one for some steps on a task of reasoning-gym, answers
HumanEval, and heals for a few steps more by other parts: a vLLM teacher, and one rank in float32.
Fails where a command fails, where the healed model is not nearer to the teacher, or where it does
not answer better. All but the last is in bfloat16 where the processor multiplies it.

    make real        # python -m benchmarks.real.run --out runs/real.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from async_opd.launch.new_run import environment

INPUTS = Path("build/smollm2")
HEAL, GYM, HUMANEVAL = (
    f"configs/smollm2_{name}.toml" for name in ("heal", "reasoning_gym", "humaneval")
)
HEALED, GYMNAST, CODED = (
    Path(f"runs/smollm2_{name}") for name in ("heal", "reasoning_gym", "humaneval")
)
FLOAT32 = ("rollout.dtype=float32", "teacher.dtype=float32", "learner.dtype=float32")
OTHERS = {  # that heal for a few steps
    "vllm": ("teacher.backend=vllm",),
    "float32": (
        *FLOAT32,
        "learner.ranks=1",
        "learner.zero_stage=0",
    ),
}
FEW = (
    "run.steps=3",
    "learner.warmup_steps=1",
    "eval.problems=16",
    "teacher.evaluate=false",
    "learner.trajectories_per_step=8",
)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "async_opd", *words]


class Stages:
    """The stages of the run, each with how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, words: list[str]) -> None:
        """Run one command. Exits where it fails."""
        print(
            f"\n$ {' '.join(words).replace(f'{sys.executable} -m async_opd', 'async-opd')}",
            flush=True,
        )
        started = time.monotonic()
        # threads that wait sleep, so that those of the other processes work meanwhile
        status = subprocess.run(words, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}).returncode
        self.seconds[name] = round(time.monotonic() - started, 1)
        if status:
            sys.exit(f"{name}: exit status {status}")


def multiplies_bfloat16() -> bool:
    """Tell whether the processor has instructions for it, without which it is slower than
    float32."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/real.json"))
    out = parser.parse_args().out
    stages, dtype = Stages(), () if multiplies_bfloat16() else FLOAT32
    stages.run("heal", command("train", HEAL, *dtype))
    stages.run("report", command("report", f"{HEALED}"))
    stages.run("export", command("export", f"{HEALED}"))
    before, after = INPUTS / "student", HEALED / "export"
    measured = HEALED / "divergence.json"
    words = [f"{INPUTS / 'teacher'}", f"{INPUTS / 'chat_heldout.jsonl'}", f"{before}", f"{after}"]
    divergence = [sys.executable, "-m", "benchmarks.real.divergence", *words]
    stages.run("divergence", [*divergence, "--out", f"{measured}"])
    stages.run("reasoning_gym", command("train", GYM, *dtype))
    stages.run("humaneval", command("eval", HUMANEVAL, *dtype[:1]))
    for name, overrides in OTHERS.items():
        place = f"run.dir=runs/smollm2_{name}"
        stages.run(name, command("train", HEAL, *dtype, *FEW, *overrides, place))
    figures = {
        "heal": read(HEALED / "summary.json"),
        "divergence": read(measured),
        "reasoning_gym": read(GYMNAST / "summary.json"),
        "humaneval": read(CODED / "result.json")["figures"],
        "others": {name: read(Path(f"runs/smollm2_{name}/summary.json")) for name in OTHERS},
    }
    machine = {"machine": platform.platform(), **environment()}
    out.write_text(json.dumps({**figures, "seconds": stages.seconds, **machine}, indent=2))
    for line in told(figures, stages.seconds, before, after):
        print(line)
    nearer = figures["divergence"][f"{after}"]["kl"] < figures["divergence"][f"{before}"]["kl"]
    better = figures["heal"]["accuracy_after"] > figures["heal"]["accuracy_before"]
    if not (nearer and better):
        sys.exit("the healed model is not nearer to its teacher, or answers no better")


def told(figures: dict, seconds: dict, before: Path, after: Path) -> list[str]:
    """Put the figures into words."""
    heal, kl, gym = figures["heal"], figures["divergence"], figures["reasoning_gym"]
    pass_1 = figures["humaneval"]["avg"]["mean"]
    return [
        "",
        "SmolLM2 without 4 of its 30 layers, before -> after (the whole one)",
        f"  accuracy   {heal['accuracy_before']:.1%} -> {heal['accuracy_after']:.1%}"
        f" ({heal['teacher_accuracy']:.1%})",
        f"  KL         {kl[f'{before}']['kl']:.2f} -> {kl[f'{after}']['kl']:.2f} nats a token",
        f"  length     {kl[f'{before}']['tokens']:.1f} -> {kl[f'{after}']['tokens']:.1f} tokens",
        f"  {heal['trained_tokens_per_s']:.0f} trained tokens/s",
        f"the whole one on reasoning-gym, before -> after: {gym['accuracy_before']:.1%} ->"
        f" {gym['accuracy_after']:.1%}; on HumanEval: {pass_1:.1%}",
        f"{sum(seconds.values()) / 60:.1f} min: {seconds}",
    ]


if __name__ == "__main__":
    main()
