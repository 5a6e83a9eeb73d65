"""Every objective trains the demo's task on the whole real stack at bound 4, with what it needs
supplied.

A row each: what was asked for (overrides of `configs/demo.toml`), trained tokens per second,
largest lag, and the mean of its metrics over the steps. Fails where a run fails, misses a step,
exceeds the bound or logs a number that is not finite. Speeds are those of short runs: 20 steps, the
first ones included.

    python benchmarks/methods.py --out methods.json [--only dear egrsd …] [--steps 20]
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from async_opd.launch.new_run import environment

COMMON = (
    "run.max_lag_steps=4",
    "teacher.evaluate=false",
    "eval.problems=16",
    "learner.trajectories_per_step=32",
    "learner.warmup_steps=1",
    "learner.lr=2e-4",
)
SELF_TEACHER = (
    "teacher.model=toy:student",
    "data.solution=solution",
    'teacher.context="{solution}{prompt}"',
    "teacher.max_prompt_tokens=64",
)
GROUPS = ("rollout.samples_per_prompt=4",)
TAUGHT = (
    "teacher_sampling.share=0.25",
    "teacher_sampling.full_until_step=6",
    "teacher_sampling.until_step=12",
)
METHODS = {  # name: the objective, and overrides
    "opd": ('{tag="opd"}',),
    "opd, PPO with dual clip": ('{tag="opd", correction={tag="ppo", dual_clip=3.0}}',),
    "opd, gate, prefix, random, constant": (
        '{tag="opd", drift_gate={block=8}, position={share=0.8}, random={share=0.5}, constant=1.2}',
    ),
    "g_opd": ('{tag="g_opd"}',),
    "iw_opd": ('{tag="iw_opd"}',),
    "iw_opd on g_opd": ('{tag="iw_opd", lambda=1.25}', "reference.replicas=1"),
    "dear": ('{tag="dear"}',),
    "sg_opd": ('{tag="sg_opd"}', *GROUPS, *TAUGHT),
    "egrsd": ('{tag="egrsd"}', *SELF_TEACHER),
    "cl_egrsd, EMA teacher": ('{tag="cl_egrsd"}', *SELF_TEACHER, "teacher.update=ema"),
    "mc_opd": ('{tag="mc_opd", m=4}',),
    "topk_kl, the student's support": (
        '{tag="topk_kl", k=8, support="student", prefix={at_most=2.0}}',
    ),
    "topk_kl, forward": ('{tag="topk_kl", k=8, divergence="forward"}',),
    "eopd": ('{tag="eopd", k=8, tau=0.1}',),
    "opd, freshness and anchor": (
        '{tag="opd", freshness={alpha=1.0, lambda=0.1}, mean_over="sequences"}',
    ),
    "opd, a task reward beside it": (
        '{tag="opd", reward={weight=1.0, baseline="group", length_penalty=0.1}}',
        *GROUPS,
    ),
    "opd, ratio of the prefix": (
        '{tag="opd", correction={tag="importance", ratio="prefix", at_most=5.0}}',
    ),
    "opd, the prefix's mean, gated": (
        '{tag="opd", correction={tag="importance", ratio="prefix_normalised",'
        " narrowing=[0.03, 0.04]}}",
    ),
    "topk_kl, the rest sampled": ('{tag="topk_kl", k=8, rest="sampled"}',),
    "top_d, future and group": ('{tag="top_d", future=true, normalise=true}', *GROUPS),
    "renio": ('{tag="renio"}',),
    "rg_opd": ('{tag="rg_opd", k=8}', *GROUPS),
    "opsa": ('{tag="opsa"}',),
}
SHOWN = ("kl", "weight_mean", "weight_max", "weight_ess", "ratio_ess", "selected")


def run(name: str, steps: int, folder: Path) -> dict:
    """One job through the command line; its row."""
    objective, *overrides = METHODS[name]
    command = [
        sys.executable,
        "-m",
        "async_opd",
        "demo",
        f"run.dir={folder}/run",
        f"run.steps={steps}",
    ]
    command += [*COMMON, f"objective={objective}", *overrides]
    job = subprocess.run(command, capture_output=True, text=True)
    if job.returncode:
        raise SystemExit(f"{name}: exit {job.returncode}\n{job.stdout[-2000:]}{job.stderr[-2000:]}")
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    numbers = {
        key: [row[key] for row in rows if isinstance(row[key], int | float)] for key in rows[0]
    }
    assert len(rows) == steps and max(numbers["lag_max"]) <= 4, f"{name}: {len(rows)} steps"
    assert all(math.isfinite(value) for values in numbers.values() for value in values), name
    numbers = {key: values for key, values in numbers.items() if values}
    means = {key: statistics.fmean(values) for key, values in numbers.items()}
    return {
        "name": name,
        "objective": objective,
        "overrides": overrides,
        "summary": summary,
        "means": means,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    found = []
    print(
        "method".ljust(36)
        + "".join(title.rjust(12) for title in ("tokens/s", "largest lag", "dropped", *SHOWN))
    )
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found.append(row := run(name, args.steps, Path(folder)))
        summary, means = row["summary"], row["means"]
        cells = [
            f"{summary['trained_tokens_per_s']:.0f}",
            str(summary["max_lag_seen"]),
            str(summary["scored_dropped"]),
        ]
        cells += [f"{means[key]:.3g}" for key in SHOWN]
        print(name.ljust(36) + "".join(cell.rjust(12) for cell in cells), flush=True)
    machine = {"hardware": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    args.out.write_text(json.dumps({"rows": found} | machine | environment(), indent=2))


if __name__ == "__main__":
    main()
