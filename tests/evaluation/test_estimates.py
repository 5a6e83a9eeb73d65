"""Against every set of k responses, one by one."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from async_opd.evaluation.estimates import intervals, majority_at_k, means_of, pass_at_k


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 2), (6, 6), (7, 3)])
def test_pass_at_k_is_the_share_of_sets_of_k_with_a_right_one(n, k):
    for c in range(n + 1):
        sets = list(combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-12)


def test_pass_at_k_stays_exact_where_the_binomials_are_beyond_a_float():
    exact = 1 - Fraction(1, 2) * Fraction(4999, 9999)  # k = 2, half of 10,000 are right
    assert pass_at_k(10_000, 5_000, 2) == pytest.approx(float(exact), rel=1e-12)
    assert 0.999 < pass_at_k(10_000, 10, 5_000) < 1
    assert 0 < pass_at_k(10_000, 1, 1) < 1.1e-4


def by_hand(right: int, wrong: list[int], silent: int, k: int) -> Fraction:
    """The vote of every set of k, a tie shared."""
    answers = (
        ["right"] * right
        + [f"wrong {i}" for i, size in enumerate(wrong) for _ in range(size)]
        + [None] * silent
    )
    sets, won = list(combinations(answers, k)), Fraction(0)
    for drawn in sets:
        votes = Counter(answer for answer in drawn if answer is not None)
        first = [answer for answer, count in votes.items() if count == max(votes.values())]
        won += Fraction("right" in first, max(len(first), 1))
    return won / len(sets)


@pytest.mark.parametrize(
    ("right", "wrong", "silent"),
    [
        (1, [], 0),
        (3, [2], 1),
        (2, [2, 2], 0),
        (1, [1, 1, 1], 2),
        (4, [3, 1, 1], 1),
        (0, [3, 2], 1),
        (2, [], 3),
    ],
)
def test_majority_at_k_is_the_mean_vote_of_all_sets_of_k(right, wrong, silent):
    for k in range(1, right + sum(wrong) + silent + 1):
        assert majority_at_k(right, wrong, silent, k) == pytest.approx(
            float(by_hand(right, wrong, silent, k)), abs=1e-12
        )


def test_a_vote_of_one_is_the_share_of_right_ones():
    assert majority_at_k(3, [4, 1], 2, 1) == pytest.approx(0.3)


def test_the_interval_of_many_problems_is_that_of_the_normal_law():
    # a mean of 0.7 with a standard error of sqrt(0.21 / 1000)
    values = np.repeat([0.0, 1.0], [300, 700])[:, None]
    (low,), (high,) = intervals(values, seed=0)
    half = NormalDist().inv_cdf(0.975) * (0.21 / 1000) ** 0.5
    assert (low, high) == (
        pytest.approx(0.7 - half, abs=0.003),
        pytest.approx(0.7 + half, abs=0.003),
    )
    assert np.array_equal(intervals(values, seed=0), intervals(values, seed=0))


def test_columns_are_resampled_together():
    rng = np.random.default_rng(1)
    first = rng.random(200)
    low, high = intervals((first + 0.1 - first)[:, None], seed=0)
    # paired: the noise is gone
    assert (low.item(), high.item()) == (pytest.approx(0.1), pytest.approx(0.1))
    low, high = intervals(np.stack([first, first + 0.1], 1), seed=0)
    assert np.allclose(low[1] - low[0], 0.1) and np.allclose(high[1] - high[0], 0.1)


def test_a_problem_without_a_value_is_left_out_of_its_column_alone():
    assert means_of(np.array([[1.0, np.nan], [0.0, 0.5]])).tolist() == [0.5, 0.5]
