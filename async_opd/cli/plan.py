"""Say whether a config fits on GPUs, what of it goes where, and what to change; starts nothing.

Checks the config, models, vocabularies and the rows of data (of a hub's set the first), places
every role on nodes and GPUs, and estimates the memory of each by parts. Exit status 0: it fits, 1:
it does not, and a change that was tried is named, 2: the config is wrong. With --offline neither
hub nor data is asked: shapes of common models are shipped.

    async-opd plan configs/node8_deepmath_4b.toml --offline
    async-opd plan configs/dear.toml rollout.generators=5 --offline
        --nodes 2 --gpus-per-node 5 --gpu-memory-gib 40
    async-opd plan configs/dear.toml --like RUN  # how many generators keep up, by a run's rates
"""

import argparse
import sys
from contextlib import redirect_stdout, suppress

from async_opd.cli.options import OVERRIDES, count, path

MOST_GIB = 1_000_000  # of a card


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "async-opd plan CONFIG [key=value ...] [--offline] [--json] [options]"
    parser.add_argument("config", type=path, metavar="CONFIG", help="a TOML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)
    parser.add_argument("--offline", action="store_true", help="ask neither hub nor data")
    parser.add_argument("--json", action="store_true", help="the plan as one object")
    parser.add_argument(
        "--nodes", type=count, metavar="N", help="of the cluster; absent: as many as are needed"
    )
    parser.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="8 unless said")
    parser.add_argument(
        "--gpu-memory-gib", type=_size, default=80.0, metavar="GIB", help="80 unless said"
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--like", type=path, metavar="RUN", help="a short run's directory, to take rates from"
    )
    rates.add_argument(
        "--rates", metavar="ROLE=RATE,…", help="tokens/s of one generator, teacher and learner rank"
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from async_opd.tools.plan.make import Cluster
    from async_opd.tools.plan.plan import plan
    from async_opd.tools.plan.report import lines

    cluster = Cluster(
        nodes=args.nodes, gpus_per_node=args.gpus_per_node, gpu_memory_gib=args.gpu_memory_gib
    )
    with redirect_stdout(
        sys.stderr
    ):  # how far it is with long rows of data; the plan alone is ours
        made = plan(
            args.config, args.overrides, cluster, args.rates, args.like, offline=args.offline
        )
    print(msgspec.json.encode(made).decode() if args.json else "\n".join(lines(made)))
    return 0 if made.fits else 1


def _size(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= MOST_GIB:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number > 0 and <= {MOST_GIB}")
