"""Change the number of generators, teachers or references of a run that is training, or the servers
that a teacher or the reference is.

RUN is its directory, or the id that `submit` printed; a submitted run is asked by a short job on
its cluster. A server that is new is looked at before it is asked; what one that goes has in hand is
asked of the others.

  async-opd scale runs/demo generators=2
  async-opd scale runs/demo teacher.urls=+http://b:8000 teacher.urls=-http://a:8000
  async-opd scale raysubmit_4LamXRuQpYdSMg7J generators=3 teachers.math=2
"""

import argparse

from async_opd.cli.options import ADDRESS, path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("which", metavar="RUN", help="its directory, or the id of its job")
    parser.add_argument(
        "changes",
        nargs="+",
        metavar="POOL=NUMBER",
        help="such as generators=3 or teachers.math=2; of servers POOL.urls=+URL, POOL.urls=-URL",
    )
    parser.add_argument("--address", metavar="URL", help=ADDRESS)


def run(args: argparse.Namespace) -> int:
    from async_opd.driver import resize

    changes = resize.parse(args.changes)
    if args.which.startswith("raysubmit_"):
        from async_opd.runtime.jobs import Jobs

        return Jobs(args.address).scale(args.which, args.changes)
    print(resize.ask(path(args.which), changes))
    return 0
