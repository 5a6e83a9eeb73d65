"""Change the number of generators or teachers of a job that is training."""

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="its directory")
    parser.add_argument("sizes", nargs="+", metavar="POOL=NUMBER", help="such as generators=3 or teachers.math=2")


def run(args: argparse.Namespace) -> int:
    from async_opd import scale

    print(scale.ask(args.run_dir, scale.parse(args.sizes)))
    return 0
