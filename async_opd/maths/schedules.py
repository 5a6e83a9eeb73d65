"""Weights that change over the optimizer steps of a run."""

import math


def phased_weight(step: int, *, full_until: int, until: int, start: float, end: float) -> float:
    """Weight of the teacher's own answers at optimizer step `step`: full, then half a cosine, then
    none.

    α(t) = α₀ for t ≤ P₁, α₁ + (α₀ − α₁)/2 · (1 + cos(π (t − P₁)/(P₂ − P₁))) for P₁ < t ≤ P₂, 0 for
    t > P₂

    SG-OPD, https://arxiv.org/abs/2606.09304, Eq. 2-3 and 11. `full_until` is P₁, `until` P₂,
    `start` α₀, `end` α₁.

    >>> weights = (phased_weight(t, full_until=30, until=35, start=1, end=0) for t in (30, 31, 35))
    >>> [round(weight, 6) for weight in weights]
    [1, 0.904508, 0.0]
    """
    if step <= full_until:
        return start
    if step > until:
        return 0.0
    return end + (start - end) / 2 * (
        1 + math.cos(math.pi * (step - full_until) / (until - full_until))
    )
