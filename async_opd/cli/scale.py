"""Change the number of generators, teachers or references of a run that is training.

RUN is its directory, or the id that `submit` printed; a submitted run is asked by a short job on
its cluster.

  async-opd scale runs/demo generators=2
  async-opd scale raysubmit_4LamXRuQpYdSMg7J generators=3 teachers.math=2
"""

import argparse

from async_opd.cli.options import ADDRESS, path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", metavar="RUN", help="its directory, or the id of its job")
    parser.add_argument(
        "sizes", nargs="+", metavar="POOL=NUMBER", help="such as generators=3 or teachers.math=2"
    )
    parser.add_argument("--address", metavar="URL", help=ADDRESS)


def run(args: argparse.Namespace) -> int:
    from async_opd.driver import resize

    sizes = resize.parse(args.sizes)
    if args.which.startswith("raysubmit_"):
        from async_opd.runtime.jobs import Jobs

        return Jobs(args.address).scale(args.which, args.sizes)
    print(resize.ask(path(args.which), sizes))
    return 0
