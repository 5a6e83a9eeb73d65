"""The commands. The one place that prints an error without a trace."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from async_opd.errors import AsyncOpdError, CallFailed, ConfigError

if TYPE_CHECKING:
    from async_opd.checkpoints import Checkpoint
    from async_opd.config import Config

DEMO = Path(__file__).parent / "toy" / "demo.toml"
OVERRIDES = "settings of the config to replace, such as learner.lr=1e-4"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that failed, 2 for a mistake in what was asked."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except AsyncOpdError as e:
        if isinstance(e, CallFailed) and e.__cause__:
            _complain(f"{e.__cause__}")  # with the trace of where it was raised
        notes = "".join(f" ({note})" for note in getattr(e, "__notes__", ()))
        _complain(" ".join(f"{type(e).__name__}: {e}{notes}".splitlines()))
        return e.exit_status
    except KeyboardInterrupt:
        _complain("interrupted; what was trained is in the newest checkpoint, unless it says otherwise above")
        return 130


def _complain(text: str) -> None:
    from async_opd.metrics import say

    say(f"async-opd: {text}", sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="async-opd", description="Asynchronous on-policy distillation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="distil a student as a TOML config says, or go on with a run")
    train.usage = "async-opd train CONFIG [key=value ...] | --resume RUN [key=value ...]"
    train.add_argument("words", nargs="*", metavar="CONFIG", help="the config, a TOML file; then " + OVERRIDES)
    train.add_argument("--resume", type=Path, metavar="RUN", help="a run's directory, or one of its checkpoints")
    train.set_defaults(run=_train_or_resume)
    demo = commands.add_parser("demo", help="train with the shipped demo: column addition, on CPU")
    demo.set_defaults(run=_train, config=DEMO)
    evaluation = commands.add_parser("eval", help="greedy accuracy of student.model on the config's [eval] problems")
    evaluation.add_argument("config", type=Path)
    evaluation.set_defaults(run=_eval)
    explain = commands.add_parser("explain", help="what an objective does to given rollouts, token by token")
    explain.usage = "async-opd explain --objective NAME [key=value ...] FILE.json [--json]"
    explain.add_argument("--objective", required=True, metavar="NAME", help="its tag, such as dear")
    explain.add_argument("given", nargs="+", metavar="FILE.json", help="settings such as p=0.3, then rollouts")
    explain.add_argument("--json", action="store_true", help="exact numbers instead of a table")
    explain.set_defaults(run=_explain)
    audit = commands.add_parser("audit", help="prove from a run's ledger that no prompt was lost or trained twice")
    audit.add_argument("run_dir", type=Path, metavar="RUN", help="its directory")
    audit.add_argument("--json", action="store_true", help="the books as one object")
    audit.set_defaults(run=_audit)
    scale = commands.add_parser("scale", help="change the number of generators or teachers of a job that is training")
    scale.add_argument("run_dir", type=Path, metavar="RUN", help="its directory")
    scale.add_argument("sizes", nargs="+", metavar="POOL=NUMBER", help="such as generators=3 or teachers.math=2")
    scale.set_defaults(run=_scale)
    for command in (demo, evaluation):
        command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    return parser


def _train_or_resume(args: argparse.Namespace) -> int:
    if args.resume is None:
        if not args.words:
            raise ConfigError("train: needs a config, a TOML file, or --resume RUN")
        args.config, *args.overrides = args.words
        return _train(args)
    from async_opd.checkpoints import find, run_of
    from async_opd.config import load_run

    config, found = load_run(run_of(args.resume), args.words), find(args.resume)
    if found.state.version >= config.run.steps:
        done = f"{found.folder} is of step {found.state.version}, so nothing is left to train"
        raise ConfigError(f"run.steps = {config.run.steps}: must be larger to go on: {done}")
    return _run(config, found)


def _train(args: argparse.Namespace) -> int:
    from async_opd.config import load

    return _run(load(args.config, args.overrides))


def _run(config: "Config", found: "Checkpoint | None" = None) -> int:
    from async_opd.metrics import say, time_table
    from async_opd.run import run  # the heavy imports wait until the config is known to be right

    summary = asyncio.run(run(config, found))
    lines = ["", time_table(summary)]
    if "accuracy_before" in summary:
        lines.append(f"accuracy on {summary['eval_problems']} held-out problems, greedy")
        for key in (key for key in summary if key.startswith("teacher_accuracy")):
            name, share = key.replace("_accuracy", "").replace("_", " ", 1), summary[key]
            lines.append(f"  {name:17}{share:8.1%}" if share is not None else f"  {name:9}   not measured")
        lines.append(f"  student, before  {summary['accuracy_before']:8.1%}")
        lines.append(f"  student, after   {summary['accuracy_after']:8.1%}")
    lines.append(
        f"{summary['steps']} steps, {summary['trained_tokens_per_s']:.0f} trained tokens/s, "
        f"largest lag {summary['max_lag_seen']}, {summary['scored_dropped']} scored and dropped, "
        f"{summary['wall_s']:.0f} s; {config.run.dir}/summary.json"
    )
    say("\n".join(lines))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from async_opd.config import load

    config = load(args.config, args.overrides, training=False)
    if config.eval is None:
        raise ConfigError("eval: missing; this command needs a section [eval] with path")
    from async_opd.run import run_eval

    found = asyncio.run(run_eval(config))
    print(f"{config.student.model}: {found.share:.1%} of {found.problems} problems, {found.unknown} unknown")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from async_opd.config import load_objective

    files = [word for word in args.given if "=" not in word or Path(word).exists()]
    objective = load_objective(args.objective, [word for word in args.given if word not in files])
    if len(files) != 1:
        raise ConfigError(f"explain: needs one file with rollouts, got {', '.join(files) or 'none'}")
    import msgspec

    from async_opd.explain.effect import explain  # torch waits until the objective is known to be right
    from async_opd.explain.given import read
    from async_opd.explain.table import table

    rollouts = read(files[0])
    effects = explain(objective, rollouts, files[0])
    if args.json:
        print(json.dumps({"objective": msgspec.to_builtins(objective), "trajectories": effects}))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(*table(rollouts, effects, colour=colour), sep="\n")
    return 0


def _audit(args: argparse.Namespace) -> int:
    import msgspec

    from async_opd.audit.books import audit

    books = audit(args.run_dir)
    print(msgspec.json.encode(books).decode() if args.json else "\n".join(books.lines()))
    return 1 if books.discrepancies else 0


def _scale(args: argparse.Namespace) -> int:
    from async_opd import scale

    print(scale.ask(args.run_dir, scale.parse(args.sizes)))
    return 0
