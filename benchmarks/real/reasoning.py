"""A task of reasoning-gym as data and its verifier as the check: how an environment of single turns
is brought along.

An environment that makes questions and scores answers needs two things here. Its questions become
rows, whose reference answer is a text that holds whatever its verifier asks for (`rows`); its
verifier becomes a function of a response and that text (`score`). A config then says

    data.path = "build/smollm2/gym_train.jsonl"
    verify.check = "benchmarks.real.reasoning:score"

    python -m benchmarks.real.reasoning chain_sum build/smollm2 max_terms=2 max_digits=2
"""

import argparse
import json
import re
from functools import lru_cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import reasoning_gym

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:[./]\d+)?")
BLOCK = 256  # questions that are drawn at a time
DRAWS = 100  # blocks without a new question, after which a task has no more


def rows(task: str, settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, list[dict]]:
    """Draw so many rows for each name of `sizes`, no question twice in all of them."""
    entries: dict[str, dict] = {}
    wanted, barren = sum(sizes.values()), 0
    for seed in count():
        before = len(entries)
        for entry in reasoning_gym.create_dataset(task, size=BLOCK, seed=seed, **settings):
            entries.setdefault(entry["question"], entry)
        barren = 0 if len(entries) > before else barren + 1
        if len(entries) >= wanted:
            break
        if barren == DRAWS:
            raise SystemExit(f"{task} {settings}: has {len(entries)} questions, not {wanted}")
    # what has few questions is drawn out first: in that order the parts would differ
    drawn = iter(Random(0).sample(list(entries.values()), wanted))
    return {
        name: [row(f"{name}-{index:04d}", task, settings, next(drawn)) for index in range(size)]
        for name, size in sizes.items()
    }


def row(id: str, task: str, settings: dict[str, Any], entry: dict[str, Any]) -> dict:
    """Make one row. Its solution is for teachers that are shown it."""
    reference = {"task": task, "settings": settings, "entry": entry}
    return {
        "id": id,
        "prompt": [{"role": "user", "content": entry["question"]}],
        "answer": json.dumps(reference),
        "solution": entry["answer"],
    }


def score(response: str, answer: str) -> bool:
    """Check a response: whether the task's own verifier gives its answer the full score."""
    reference = json.loads(answer)
    verifier = task_of(reference["task"], json.dumps(reference["settings"]))
    return verifier.score_answer(answer_of(response), reference["entry"]) >= 1


@lru_cache
def task_of(task: str, settings: str) -> reasoning_gym.dataset.ProceduralDataset:
    """Build the task, which knows how to score its entries, whichever were drawn."""
    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(settings))


def answer_of(response: str) -> str:
    """Read the answer out of a response: what stands between <answer> tags, as reasoning-gym asks
    for it; else, for models that know no tags, the last number; else all of it."""
    if tagged := TAGGED.findall(response):
        return tagged[-1].strip()
    return (NUMBER.findall(response) or [response.strip()])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", help="of reasoning-gym")
    parser.add_argument("folder", type=Path, help="of the two files")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the task, in JSON")
    parser.add_argument("--train", type=int, default=256, help="rows")
    parser.add_argument("--heldout", type=int, default=64, help="rows")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pairs = (setting.split("=", 1) for setting in args.settings)
    settings = {key: json.loads(value) for key, value in pairs}
    sizes = {"heldout": args.heldout, "train": args.train}
    for name, made in rows(args.task, settings, sizes).items():
        path = args.folder / f"gym_{name}.jsonl"
        path.write_text("".join(f"{json.dumps(each)}\n" for each in made), encoding="utf-8")
        print(f"{path}: {len(made)} rows")


if __name__ == "__main__":
    main()
