"""Train with the shipped demo: column addition, on CPU.

A half-trained student learns from a teacher; both are shipped, and two cores take two to five
minutes. The config is configs/demo.toml, whose settings can be replaced; the run is in runs/demo.

  async-opd demo
  async-opd demo run.dir=runs/sync run.max_lag_steps=0
"""

import argparse
from pathlib import Path

import async_opd
from async_opd.cli.options import OVERRIDES
from async_opd.cli.train import train

CONFIG = Path(async_opd.__file__).parent / "toy" / "demo.toml"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def run(args: argparse.Namespace) -> int:
    from async_opd.config.load import load

    return train(load(CONFIG, args.overrides))
