"""Estimates from several responses to each problem: pass@k, maj@k, and how sure the means are.

Of a problem's n responses c are right. Each is the mean over all sets of k of the n, so more
responses than k make it surer and leave what it estimates.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import comb

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95


def pass_at_k(n: int, c: int, k: int) -> float:
    """Compute the probability that one of k is right: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374
    Eq. 1), as the product over the last c places i of 1 - k / i, which never leaves [0, 1].

    >>> pass_at_k(4, 1, 2)  # 1 - 3/6
    0.5
    >>> pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)  # no right one; two wrong ones are too few
    (0.0, 1.0)
    """
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def majority_at_k(right: int, wrong: Sequence[int], silent: int, k: int) -> float:
    """Compute the probability that the right answer wins the vote of k, a tie being decided by lot.
    `right` responses agree on it, `wrong` ones on each of the others; `silent` ones hold no answer.

    Σ_v C(right, v) Σ_t W(v, t) / (t + 1) / C(n, k), where W counts the ways in which the other k -
    v leave no wrong answer more than v votes and t of them exactly v.

    >>> majority_at_k(1, [1], 0, 2), majority_at_k(2, [1], 0, 3)  # a tie; two against one
    (0.5, 1.0)
    """
    if not right:
        return 0.0
    won = sum(
        comb(right, votes) * _lost(wrong, silent, k - votes, votes)
        for votes in range(1, min(right, k) + 1)
    )
    return float(won / comb(right + sum(wrong) + silent, k))


def _lost(wrong: Sequence[int], silent: int, others: int, votes: int) -> Fraction:
    """Sum Σ_t W(votes, t) / (t + 1): ways to draw `others` that do not beat `votes`, a tie of t + 1
    as its share."""
    ways = {(0, 0): 1}  # by how many are drawn and how many answers are at `votes`
    for size in wrong:
        more: dict[tuple[int, int], int] = {}
        for (drawn, tied), count in ways.items():
            for taken in range(min(size, votes, others - drawn) + 1):
                state = drawn + taken, tied + (taken == votes)
                more[state] = more.get(state, 0) + count * comb(size, taken)
        ways = more
    return sum(
        (
            Fraction(count * comb(silent, others - drawn), tied + 1)
            for (drawn, tied), count in ways.items()
        ),
        Fraction(),
    )


def intervals(values_PM: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Compute intervals of LEVEL for the mean of each column over the problems, by the percentile
    bootstrap; NaN is left out. Columns share their resamples, so differences of columns are paired.
    Returns [2, M].

    >>> intervals(np.array([[0.0, 1.0], [1.0, 1.0]]), seed=0).tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    rng, problems = np.random.default_rng(seed), len(values_PM)
    means = [means_of(values_PM[rng.integers(problems, size=problems)]) for _ in range(RESAMPLES)]
    tail = (1 - LEVEL) / 2
    return np.nanquantile(np.array(means), [tail, 1 - tail], axis=0)


def means_of(values_PM: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Average each column over what is no NaN, [M]; NaN where nothing is left.

    >>> means_of(np.array([[1.0, np.nan], [0.0, np.nan]])).tolist()
    [0.5, nan]
    """
    known_M = (~np.isnan(values_PM)).sum(0)
    return np.where(known_M > 0, np.nansum(values_PM, 0) / np.maximum(known_M, 1), np.nan)
