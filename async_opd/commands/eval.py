"""Greedy accuracy of student.model on the config's [eval] problems."""

import argparse
import asyncio
from pathlib import Path

from async_opd.commands import OVERRIDES
from async_opd.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)


def run(args: argparse.Namespace) -> int:
    from async_opd.config import load

    config = load(args.config, args.overrides, training=False)
    if config.eval is None:
        raise ConfigError("eval: missing; this command needs a section [eval] with path")
    from async_opd.run import run_eval

    found = asyncio.run(run_eval(config))
    print(f"{config.student.model}: {found.share:.1%} of {found.problems} problems, {found.unknown} unknown")
    return 0
