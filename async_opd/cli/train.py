"""Distil a student as a TOML config says, or go on with a run.

Checks the whole config, then starts generators, teachers, verifier and learner on a Ray cluster:
that of RAY_ADDRESS, one that runs here, or one of its own. Everything goes into run.dir; an earlier
run there is kept beside it. One Ctrl-C lets the step at hand finish, saves a checkpoint and ends;
--resume goes on from the newest checkpoint, or from the one that is named, with other settings
where they are given, which are the run's once it goes on; what lies behind that checkpoint is kept
in RUN/set-aside/. A run that was killed in its last evaluation does just that. One at a time works
in a run's directory.

  async-opd train configs/demo.toml run.dir=runs/slow learner.lr=2e-4
  async-opd train --resume runs/slow run.steps=200
  async-opd train --resume runs/slow/checkpoints/000100
"""

import argparse
import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from async_opd.cli.options import OVERRIDES, path
from async_opd.core.errors import CheckpointError, ConfigError
from async_opd.core.files import from_home
from async_opd.core.reading import refused

if TYPE_CHECKING:
    from async_opd.config.schema import Config
    from async_opd.driver.checkpoints import Checkpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "async-opd train CONFIG [key=value ...] | --resume RUN [key=value ...]"
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG", help="the config, a TOML file; then " + OVERRIDES
    )
    parser.add_argument(
        "--resume", type=path, metavar="RUN", help="a run's directory, or one of its checkpoints"
    )


def run(args: argparse.Namespace) -> int:
    if args.resume is None:
        from async_opd.config.load import load

        if not args.words:
            raise ConfigError("train: needs a config, a TOML file, or --resume RUN")
        config, *overrides = args.words
        return train(load(Path(from_home(config)), overrides))
    return train(*read_alone(args.resume, args.words))


def read_alone(path: Path, overrides: list[str]) -> "tuple[Config, Checkpoint]":
    """Read what `to_resume` does while nobody works there. Raises RunInUse, and as that does."""
    from async_opd.config.load import read_run
    from async_opd.core.run_dir import LOCK, run_of
    from async_opd.core.run_lock import locked

    run = run_of(path)
    with refused(f"--resume {path}"):
        read_run(run, dict)  # what is no run's is not locked
        worked_in = (run / LOCK).exists()
    with locked(run, "train --resume") if worked_in else nullcontext():
        return to_resume(path, overrides)


def to_resume(
    path: Path, overrides: list[str], *, elsewhere: bool = False
) -> "tuple[Config, Checkpoint]":
    """Read the config of the run at `path`, as `load` does, and the checkpoint to go on from.
    Raises ConfigError where nothing is left, not even the last evaluation, or where a setting is
    changed that a run has for good."""
    from async_opd.config.load import load_run, read_run
    from async_opd.core.run_dir import CHECKPOINTS, LEDGER, SUMMARY, run_of
    from async_opd.driver.checkpoints import committed, find
    from async_opd.driver.resume import fixed, refuse_changed

    run = run_of(path)
    for override in overrides:
        if override.partition("=")[0] == "run.dir":
            raise ConfigError(f"{override}: a run goes on where it is, in {run}")
    with refused(f"--resume {path}"):
        config = load_run(run, overrides, elsewhere=elsewhere)
        try:
            checkpoint = find(path)
        except CheckpointError as e:
            if not committed(run / CHECKPOINTS):
                e.add_note("it has saved none yet: start it as before, and this is kept beside it")
            raise
        student = read_run(run, dict)["student"]["model"]
        refuse_changed(config, checkpoint.state.fixed or fixed(read_run(run)), student)
        summed_up, begun = (run / SUMMARY).exists(), (run / LEDGER).exists()
    step, steps = checkpoint.state.version, config.run.steps
    to_sum_up = step == steps and begun and not summed_up
    if step >= steps and not to_sum_up:
        why = f"{run / SUMMARY} says how it ended" if summed_up else "nothing is left to train"
        raise ConfigError(
            f"run.steps = {steps}: must be larger to go on: {checkpoint.folder} is of step {step},"
            f" so the run is finished: {why}"
        )
    return config, checkpoint


def train(config: "Config", checkpoint: "Checkpoint | None" = None) -> int:
    """Run it to the end and say what it reached; return the exit status."""
    from async_opd.core.printing import say
    from async_opd.launch.run import run
    from async_opd.telemetry.metrics import time_table

    try:
        summary = asyncio.run(run(config, checkpoint))
    except (KeyboardInterrupt, asyncio.CancelledError) as e:
        kept = "what was trained is in the newest checkpoint, unless it says otherwise above"
        # asyncio makes the one of the other, without its notes
        for note in getattr(e.__context__, "__notes__", () if hasattr(e, "__notes__") else [kept]):
            e.add_note(note)
        raise
    lines = ["", time_table(summary)]
    if "accuracy_before" in summary:
        teachers = {
            key.replace("_accuracy", "").replace("_", " ", 1): share
            for key, share in summary.items()
            if key.startswith("teacher_accuracy")
        }
        lines += [
            f"accuracy on {summary['eval_problems']} held-out problems, greedy",
            *(
                f"  {name:9}   not measured" if share is None else f"  {name:17}{share:8.1%}"
                for name, share in teachers.items()
            ),
            f"  student, before  {summary['accuracy_before']:8.1%}",
            "  student, after   "
            + (
                " not measured" if (after := summary["accuracy_after"]) is None else f"{after:8.1%}"
            ),
            *(
                [f"  verdicts known   {known:8.1%}"]
                if (known := summary.get("eval_known")) is not None
                else []
            ),
        ]
    lines.append(
        f"{summary['steps']} steps, {summary['trained_tokens_per_s']:.0f} trained tokens/s, "
        f"largest lag {summary['max_lag_seen']}, {summary['scored_dropped']} scored and dropped, "
        f"{summary['wall_s']:.0f} s; {config.run.dir}/summary.json"
    )
    say("\n".join(lines))
    return 0
