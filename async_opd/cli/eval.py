"""Measure a model on problems: avg@k, pass@k and maj@k, with intervals.

Samples responses to each problem through the generators, has the verifier check them, and writes
result.json and problems.jsonl, a line a problem, into a folder. avg@k is the share of right
responses, pass@k the chance that one of k is right, maj@k the chance that the answer most of k
agree on is. One response is greedy, several are sampled at temperature 1, and each may be as long
as the model's context leaves. Settings have the words of a training config: data, rollout (with
top_p), verify, timeout, run.seed; and k, problems.

    async-opd eval runs/demo/checkpoint --data runs/demo/data/heldout.jsonl --k 4
    async-opd eval Qwen/Qwen3-1.7B --data aime.parquet --k 8 --out runs/aime
        rollout.samples_per_prompt=32 rollout.temperature=0.6 rollout.top_p=0.95
        data.chat_template=true data.template_args.enable_thinking=true

What stands in a TOML file need not stand here:

    async-opd eval configs/smollm2_humaneval.toml student.model=runs/smollm2_heal/checkpoint

Two results of the same problems and settings are compared by paired resamples:

    async-opd eval --compare runs/before runs/after
"""

import argparse
import asyncio
import json

from async_opd.cli.options import path
from async_opd.core.errors import ConfigError
from async_opd.core.files import from_home

USAGE = """async-opd eval MODEL --data PATH [--k K] [--out FOLDER] [key=value ...]
       async-opd eval CONFIG.toml [--data PATH] [--k K] [--out FOLDER] [key=value ...]
       async-opd eval --compare FOLDER FOLDER"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.add_argument(
        "words", nargs="*", metavar="MODEL", help="a directory or hub id, or a TOML file"
    )
    short = {"dest": "settings", "action": "append", "default": []}
    data, out = (
        lambda text, key=key: f"{key}={json.dumps(text, ensure_ascii=False)}"
        for key in ("data.path", "run.dir")
    )
    parser.add_argument(
        "--data",
        type=data,
        metavar="PATH",
        help="the problems: a file, a folder or a hub id",
        **short,
    )
    parser.add_argument(
        "--k", type="k={}".format, metavar="K", help="of the three figures; 1 by default", **short
    )
    parser.add_argument(
        "--out",
        type=out,
        metavar="FOLDER",
        help="of the result, made new; absent, runs/eval",
        **short,
    )
    parser.add_argument(
        "--compare", nargs=2, type=path, metavar="FOLDER", help="two results of the same problems"
    )


def run(args: argparse.Namespace) -> int:
    from async_opd.config.evaluation import load_eval
    from async_opd.evaluation import result

    if args.compare:
        if args.words or args.settings:
            raise ConfigError("eval --compare: takes two results and nothing else")
        print("\n".join(result.compare(*args.compare)))
        return 0
    if not args.words or "=" in args.words[0]:
        raise ConfigError(
            "eval: needs a model, a directory or hub id: async-opd eval MODEL --data PATH"
        )
    subject, *settings = args.words
    asked = load_eval(from_home(subject), [*settings, *args.settings])
    # the heavy imports wait until the settings are known to be right
    from async_opd.evaluation.run import run_eval

    print(*result.lines_of(asyncio.run(run_eval(asked))), sep="\n")
    print(f"  {asked.run.dir}/result.json, {asked.run.dir}/problems.jsonl")
    return 0
