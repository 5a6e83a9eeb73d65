"""Say whether a config fits on GPUs, what of it goes where, and what to change; starts nothing.

Checks the config, models, vocabularies and the first rows of data, places every role on nodes and
GPUs, and estimates the memory of each by parts. Exit status 0: it fits, 1: it does not, and a
change that was tried is named, 2: the config is wrong. With --offline neither hub nor data is
asked: shapes of common models are shipped.

    async-opd plan configs/node8_deepmath_4b.toml --offline
    async-opd plan configs/dear.toml rollout.generators=5 --offline
        --nodes 2 --gpus-per-node 5 --gpu-memory-gib 40
    async-opd plan configs/dear.toml --like RUN  # how many generators keep up, by a run's rates
"""

import argparse
import math
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from async_opd.cli.options import OVERRIDES, count
from async_opd.core.errors import ClusterTooSmall, ConfigError

if TYPE_CHECKING:
    from async_opd.config.schema import Config
    from async_opd.tools.plan.balance import Balance
    from async_opd.tools.plan.report import Plan
    from async_opd.tools.plan.shape import Shape

ONLINE = ["config", "model files", "vocabularies", "columns and the first row of data"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "async-opd plan CONFIG [key=value ...] [--offline] [--json] [options]"
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
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
        "--like", type=Path, metavar="RUN", help="a short run's directory, to take rates from"
    )
    rates.add_argument(
        "--rates", metavar="ROLE=RATE,…", help="tokens/s of one generator, teacher and learner rank"
    )


def run(args: argparse.Namespace) -> int:
    import msgspec

    from async_opd.tools.plan.report import lines

    plan = _plan(args)
    print(msgspec.json.encode(plan).decode() if args.json else "\n".join(lines(plan)))
    return 0 if plan.fits else 1


def _plan(args: argparse.Namespace) -> "Plan":
    from async_opd.config.load import load
    from async_opd.maths.lag import slots
    from async_opd.tools.plan import advise, make
    from async_opd.tools.plan.report import Plan

    config = load(args.config, args.overrides)
    shapes, card = _shapes(config, args.offline), args.gpu_memory_gib * make.GIB

    def retry(more: list[str]) -> set[str] | None:
        try:
            changed = load(args.config, [*args.overrides, *more])
            make.places(changed, args.gpus_per_node, args.nodes)
        except (ConfigError, ClusterTooSmall):
            return None
        return {need.request.role for need in make.needs(changed, shapes, card) if not need.fits}

    needs = make.needs(config, shapes, card)
    problems = list(advise.problems(config, needs, retry, args.gpus_per_node))
    try:
        nodes = make.places(config, args.gpus_per_node, args.nodes)
    except ClusterTooSmall as e:
        nodes = {}
        problems.insert(0, make.Problem(what=f"{e}", changes=_more_nodes(config, args)))
    longest, bound_by = make.longest_response(config, shapes, card)
    groups = slots(config.outstanding_steps, config.groups_per_step)
    return Plan(
        config=str(args.config),
        fits=not problems,
        cluster=make.Cluster(
            nodes=args.nodes, gpus_per_node=args.gpus_per_node, gpu_memory_gib=args.gpu_memory_gib
        ),
        nodes=nodes,
        roles=[need.plan() for need in needs],
        groups_outstanding=groups,
        trajectories_outstanding=groups * config.rollout.samples_per_prompt,
        worst_lag_steps=config.run.max_lag_steps,
        longest_response=longest,
        longest_bound_by=bound_by,
        balance=_balance(args, config),
        problems=problems,
        checked=ONLINE[:1] if args.offline else ONLINE,
        skipped=ONLINE[1:] if args.offline else [],
    )


def _more_nodes(config: "Config", args: argparse.Namespace) -> list[str]:
    """Name the option for as many nodes as are needed; none where a member is larger than a
    node."""
    from async_opd.tools.plan.make import places

    try:
        return [f"--nodes {len(places(config, args.gpus_per_node, None))}"]
    except ClusterTooSmall:
        return []


def _shapes(config: "Config", offline: bool) -> "dict[str, Shape]":
    """Read the shape of each model by the model's name; and check the data, unless `offline`."""
    from async_opd.tools.plan import make, shape

    if offline:
        return {
            model: shape.local(key, model) or shape.shipped(key, model)
            for key, model in make.models(config).items()
        }
    from async_opd.launch.toy_models import resolve_toy
    from async_opd.tools.plan import checks

    shapes = checks.shapes(config)
    with TemporaryDirectory() as scratch:
        checks.rows(resolve_toy(config, Path(scratch)))
    return shapes


def _balance(args: argparse.Namespace, config: "Config") -> "Balance | None":
    from async_opd.tools.plan import balance

    if args.rates:
        return balance.balance(config, balance.parse_rates(args.rates), "rates as given", [])
    if args.like:
        rates, differs = balance.measured(args.like, config)
        return balance.balance(config, rates, f"rates of {args.like}", differs)
    return None


def _size(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number > 0")
