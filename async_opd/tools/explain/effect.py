"""What an objective makes of each token, by the functions that the learner calls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from async_opd.objectives import Objective
from async_opd.objectives.effect import effect
from async_opd.tools.explain.batch import Absent, BatchReader
from async_opd.tools.explain.rollouts import Rollouts


def explain(objective: Objective, rollouts: Rollouts, file: str | Path) -> list[dict[str, Any]]:
    """Show what `objective` does to each trajectory, as plain lists over its T tokens, by the
    names of `effect`.

    Statistics and groups are over all that is given. Raises DataError naming the trajectory, the
    field and the objective where `file`, which `rollouts` were read from, lacks what the objective
    reads, or holds what cannot be.
    """
    batch = BatchReader(objective, rollouts, file).batch()
    every_token_N = torch.ones_like(batch.segment_N, dtype=torch.bool)
    with torch.no_grad():
        batch = replace(batch, statistics=objective.statistics(batch, every_token_N))
    live = {
        "coefficient": batch.student_logp_N,
        "candidate_coefficient": batch.student_logp_NK,
        "tail_coefficient": batch.student_tail_logp_N,
    }
    columns = effect(
        objective.loss(batch), {name: x for name, x in live.items() if not isinstance(x, Absent)}
    )
    lengths = [t.length for t in rollouts.trajectories]
    split = {
        name: [None] * len(lengths)
        if value is None
        else [_plain(part.tolist()) for part in value.split(lengths)]
        for name, value in columns.items()
    }
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(lengths))]


def _plain(values: list[Any]) -> list[Any]:
    """Put None for NaN, where a metric is not of that token."""
    return [None if value != value else value for value in values]
