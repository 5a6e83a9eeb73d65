"""What an objective does to given rollouts, token by token.

Prints for each token the advantage, weight, selection, ratio and coefficient that the learner's own
functions give, and starts nothing; what signal_at_most or weight_at_most lowered is marked. The
file has rollouts with their log-probs; settings of the objective may stand before it.

  async-opd explain --objective sg_opd configs/explain_example.json
  async-opd explain --objective opd correction.tag=ppo configs/explain_example.json
"""

import argparse
import json
import os
import sys

from async_opd.cli.options import path
from async_opd.core.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "async-opd explain --objective NAME [key=value ...] FILE.json [--json]"
    parser.add_argument("--objective", required=True, metavar="NAME", help="its tag, such as dear")
    parser.add_argument(
        "words", nargs="+", metavar="FILE.json", help="settings such as p=0.3, then rollouts"
    )
    parser.add_argument("--json", action="store_true", help="exact numbers instead of a table")


def run(args: argparse.Namespace) -> int:
    from async_opd.config.load import load_objective

    files = [word for word in args.words if "=" not in word or path(word).exists()]
    objective = load_objective(args.objective, [word for word in args.words if word not in files])
    if len(files) != 1:
        raise ConfigError(
            f"explain: needs one file with rollouts, got {', '.join(files) or 'none'}"
        )
    import msgspec

    # torch waits until the objective is known to be right
    from async_opd.tools.explain.effect import explain
    from async_opd.tools.explain.rollouts import read
    from async_opd.tools.explain.table import table

    rollouts = read(path(files[0]))
    effects = explain(objective, rollouts, files[0])
    if args.json:
        print(json.dumps({"objective": msgspec.to_builtins(objective), "trajectories": effects}))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(*table(rollouts, effects, colour=colour), sep="\n")
    return 0
