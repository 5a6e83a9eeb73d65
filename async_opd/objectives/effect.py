"""What an objective makes of each token: for `explain`, and for what the learner records."""

from collections.abc import Mapping

from async_opd.maths import Tensor
from async_opd.objectives.token_batch import ComposedLoss


def effect(result: ComposedLoss, live: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """By name, over N tokens:

    advantage: [N], [N, m] of m samples a position, or None for a divergence; weight: [N], the
    method's own and what composes with it; selected: [N], 0 or 1; ratio: [N] or [N, m], the factor
    for staleness; coefficient: -∂Σℓ/∂log π by autograd before the one reduction, [N], of samples
    [N, m] with the generated token first, or [N, K] of candidates; candidate_coefficient: [N, K],
    where the objective reads both; tail_coefficient: [N], of all other ids than the candidates,
    where it reads their log-mass; then the objective's own metrics.

    `live` holds the student's log-probs, of sampled tokens as "coefficient", of candidates as
    "candidate_coefficient" and of all other ids as "tail_coefficient".
    """
    import torch

    return {
        "advantage": result.advantage,
        "weight": result.weight_N,
        "selected": result.selected_N.int(),
        "ratio": torch.ones_like(result.weight_N) if result.ratio is None else result.ratio,
        **_coefficients(result, live),
        **result.metrics,
    }


def _coefficients(result: ComposedLoss, live: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    import torch

    leaves = {name: x for name, x in live.items() if x is not None}
    slopes = torch.autograd.grad(result.loss_N.sum(), list(leaves.values()), allow_unused=True)
    by_name: dict[str, Tensor | None] = dict(zip(leaves, slopes, strict=True))
    coefficients = {name: 0 - slope for name, slope in by_name.items() if slope is not None}
    if "coefficient" not in coefficients:
        return {"coefficient": coefficients.pop("candidate_coefficient")} | coefficients
    if result.advantage is not None and result.advantage.ndim == 2:
        first, *more = coefficients.values()
        return {"coefficient": torch.cat([first[:, None], *more], 1)}
    return coefficients
