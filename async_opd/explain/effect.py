"""What an objective makes of each token, by the functions that the learner calls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from async_opd.explain.given import Absent, Given, Rollouts
from async_opd.objectives import Objective
from async_opd.objectives.base import TokenBatch


def explain(objective: Objective, rollouts: Rollouts, file: str | Path) -> list[dict[str, Any]]:
    """What `objective` does to each trajectory, as plain lists over its T tokens, by name:

    advantage: [T], [T][m] of m samples a position, or None for a divergence; weight: [T], the method's own and what
    composes with it; selected: [T], 0 or 1; ratio: [T] or [T][m], the factor for staleness; coefficient:
    -∂Σℓ/∂log π by autograd before the one reduction, [T], of samples [T][m] with the generated token first, or [T][K]
    of candidates; candidate_coefficient: [T][K], where the objective reads both; then what the objective itself shows.

    Statistics and groups are over all that is given. Raises DataError naming the trajectory, the field and the
    objective where `file`, which `rollouts` were read from, lacks what the objective reads, or holds what cannot be.
    """
    batch = Given(objective, rollouts, file).batch()
    batch = replace(batch, statistics=_statistics(objective, batch))
    result = objective.loss(batch)
    ratio = torch.ones_like(result.weight_N) if result.ratio is None else result.ratio
    columns = {"advantage": result.advantage, "weight": result.weight_N, "selected": result.selected_N.int()}
    columns |= {"ratio": ratio} | _coefficients(result.loss_N, batch, result.advantage) | result.shown
    lengths = [t.length for t in rollouts.trajectories]
    split = {
        name: [None] * len(lengths) if value is None else [part.tolist() for part in value.split(lengths)]
        for name, value in columns.items()
    }
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(lengths))]


@torch.no_grad()
def _statistics(objective: Objective, batch: TokenBatch) -> dict[str, Tensor]:
    """What the learner reduces over the kept tokens of every micro-batch and rank, here over all tokens."""
    needs, value_N = objective.needs(), objective.statistics(batch)
    found = {"tokens": torch.tensor(len(batch.segment_N), dtype=torch.float64)}
    found |= {name: value_N[name].sum(dtype=torch.float64) for name in needs.sums}
    return found | {name: value_N[name].max().double() for name in needs.maxima}


def _coefficients(loss_N: Tensor, batch: TokenBatch, advantage: Tensor | None) -> dict[str, Tensor]:
    leaves = {"coefficient": batch.student_logp_N, "candidate_coefficient": batch.student_logp_NK}
    leaves = {name: x for name, x in leaves.items() if x is not None and not isinstance(x, Absent)}
    slopes = torch.autograd.grad(loss_N.sum(), list(leaves.values()), allow_unused=True)
    found = {name: 0 - slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
    if "coefficient" not in found:
        return {"coefficient": found["candidate_coefficient"]}
    if advantage is not None and advantage.ndim == 2:
        first, *more = found.values()
        return {"coefficient": torch.cat([first[:, None], *more], 1)}
    return found
