"""Behind a command its options may stand anywhere: before its other words, between them and behind
them."""

from itertools import permutations

import pytest

from async_opd.cli.main import parsed

# A command; then its words, which keep their order; then its options.
COMMANDS = {
    "train": ("a.toml run.steps=3 learner.lr=1", []),
    "train --resume": ("run.steps=3 learner.lr=1", ["--resume runs/a"]),
    "plan": ("a.toml run.steps=3 learner.lr=1", ["--offline", "--json", "--nodes 2"]),
    "submit": ("a.toml run.steps=3 learner.lr=1", ["--no-wait", "--address URL"]),
    "eval": ("toy:student rollout.temperature=0.6 k=2", ["--data a.jsonl", "--out here"]),
    "explain": ("p=0.3 correction.tag=ppo a.json", ["--objective dear", "--json"]),
    "report": ("runs/a runs/b", ["-o both.html"]),
    "scale": ("runs/a generators=2 teachers.math=3", ["--address URL"]),
    "cluster": ("render a.toml run.dir=/shared/a", ["--kind slurm", "-o a.sh"]),
    "audit": ("runs/a", ["--json"]),
    "logs": ("id", ["--follow", "--address URL"]),
    "export": ("runs/a", ["-o here", "--checkpoint best"]),
}


def orders(words: list[str], options: list[str]) -> set[tuple[str, ...]]:
    """Every order of both in which `words` keep theirs."""
    pieces = [*range(len(words)), *options]
    orders = set()
    for order in permutations(pieces):
        kept = iter(words)
        orders.add(tuple(next(kept) if isinstance(piece, int) else piece for piece in order))
    return orders


@pytest.mark.parametrize("command", COMMANDS)
def test_options_may_stand_anywhere(command):
    words, options = COMMANDS[command]
    name = command.partition(" ")[0]
    parses = [
        vars(parsed([name, *" ".join(order).split()])) for order in orders(words.split(), options)
    ]
    for one in parses:
        # those of `eval`, in the order in which they stand
        one["settings"] = sorted(one.get("settings", []))
    assert all(one == parses[0] for one in parses)
