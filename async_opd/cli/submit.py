"""Train on a Ray cluster, as a job that goes on without you.

Checks the whole config, sends the working directory and this package (less what git ignores) to the
cluster, starts `async-opd train` there, and prints the job's id and its log. The exit status is the
job's: 0 succeeded, 1 failed, 130 stopped. Ctrl-C leaves the job running; status, logs, scale and
stop take its id.

A relative path is a file of the working directory; an absolute one is the cluster's. run.dir is
absolute, on a disk that every node sees. vLLM, DeepSpeed and the like are those of the cluster's
image (async-opd cluster render).

  async-opd submit configs/dear.toml run.dir=/shared/runs/dear --address http://127.0.0.1:8265
  async-opd submit --resume /shared/runs/dear
"""

import argparse
import os
from contextlib import chdir
from pathlib import Path

from async_opd.cli.options import ADDRESS, OVERRIDES, path
from async_opd.core.errors import ConfigError
from async_opd.core.reading import looked_up


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "async-opd submit CONFIG [key=value ...] | --resume RUN [key=value ...]\n"
        "                        [--address URL] [--no-wait] [--working-dir FOLDER]"
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG", help="the config, a TOML file; then " + OVERRIDES
    )
    parser.add_argument(
        "--resume",
        type=path,
        metavar="RUN",
        help="a run's directory on the cluster, or a checkpoint",
    )
    parser.add_argument("--address", metavar="URL", help=ADDRESS)
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    parser.add_argument(
        "--working-dir", type=path, default=".", metavar="FOLDER", help="else this folder is sent"
    )


def run(args: argparse.Namespace) -> int:
    folder = Path(os.path.realpath(args.working_dir))
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {args.working_dir}: no such folder")
    needed: dict[str, Path] = {}
    if args.resume:
        words = ["--resume", str(args.resume), *args.words]
        run_dir, last_save_s = _run_to_resume(folder, needed, args.resume, args.words)
    elif args.words:
        needed["config"] = _inside(folder, "config", path(args.words[0]).absolute())
        words, run_dir, last_save_s = _checked(folder, needed, args.words[1:])
    else:
        raise ConfigError("submit: needs a config, a TOML file, or --resume RUN")
    from async_opd.runtime.jobs import Jobs, packed

    jobs = Jobs(args.address)
    with packed(folder, needed) as package:
        id = jobs.submit(["train", *words], run_dir, package, last_save_s)
    print(id, flush=True)
    return 0 if args.no_wait else jobs.follow(id)


def _checked(
    folder: Path, needed: dict[str, Path], overrides: list[str]
) -> tuple[list[str], str, float]:
    """Check the config in `needed`; return the words of `train` for it, its run directory and the
    time of its last save. What it reads joins `needed`."""
    from async_opd.config.load import load

    file = needed["config"].relative_to(folder)
    with chdir(folder):
        config = load(file, overrides, elsewhere=True)
        run_dir = Path(config.run.dir)
        if not run_dir.is_absolute():
            raise ConfigError(
                f"run.dir = {config.run.dir!r}: must be absolute, on a disk that every node sees; a"
                " job's working directory is a copy that goes with it:"
                f" run.dir=/shared/{run_dir.name}"
            )
        needed |= _files(folder, config.relative_inputs)
    return [file.as_posix(), *overrides], str(run_dir), config.timeout.last_save_s


def _files(folder: Path, inputs: dict[str, str]) -> dict[str, Path]:
    """List what a config reads that is here and has to travel: its relative `inputs`."""
    here = {f"{key} = {name!r}": Path(name).absolute() for key, name in inputs.items()}
    return {key: _inside(folder, key, path) for key, path in here.items()}


def _inside(folder: Path, key: str, path: Path) -> Path:
    """Refuse a file outside of the working directory."""
    looked_up(key, path)
    path = Path(os.path.realpath(path))
    if not path.is_relative_to(folder):
        raise ConfigError(
            f"{key}: {path} is outside of the working directory {folder}, which is all that a job"
            " gets: move it there, or name an absolute path that every node of the cluster sees"
        )
    return path


def _run_to_resume(
    folder: Path, needed: dict[str, Path], path: Path, overrides: list[str]
) -> tuple[str, float]:
    """Name the run directory to go on with, and the time of its last save, 0 where it cannot be
    seen from here. A run that can be seen is checked as a new one is; the job checks it anyway."""
    from async_opd.cli.train import to_resume
    from async_opd.core.run_dir import run_of

    if not path.is_absolute():
        raise ConfigError(
            f"--resume {path}: must be absolute: the run's directory as the cluster's nodes see it"
        )
    last_save_s = 0.0
    if path.exists():
        with chdir(folder):
            config, _ = to_resume(path, overrides, elsewhere=True)
            needed |= _files(folder, config.relative_inputs)
            last_save_s = config.timeout.last_save_s
    return str(run_of(path)), last_save_s
