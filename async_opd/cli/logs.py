"""Print the log of a submitted run.

With --follow until the run ends; the exit status is then the run's, as that of submit. Ctrl-C
leaves it running.

  async-opd logs raysubmit_4LamXRuQpYdSMg7J --follow
"""

import argparse

from async_opd.cli.options import ADDRESS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="what submit printed")
    parser.add_argument("--follow", action="store_true", help="until the run ends")
    parser.add_argument("--address", metavar="URL", help=ADDRESS)


def run(args: argparse.Namespace) -> int:
    from async_opd.runtime.jobs import Jobs

    jobs = Jobs(args.address)
    if args.follow:
        return jobs.follow(args.id)
    print(jobs.logs(args.id), end="")
    return 0
