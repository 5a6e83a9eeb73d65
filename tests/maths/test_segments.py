import random

import pytest
import torch

from async_opd.maths.importance import sequence_ratio
from async_opd.maths.segments import before, lengths, lookahead_minimum, places, sums

LENGTHS = [4, 1, 0, 6]  # the third has no token
SEGMENT = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
VALUES = [random.Random(0).uniform(-1, 1) for _ in range(11)]
PARTS = [VALUES[0:4], VALUES[4:5], [], VALUES[5:]]


def test_sums_lengths_and_places_are_those_of_each_trajectory_also_of_one_without_tokens():
    assert lengths(SEGMENT, 4).tolist() == LENGTHS
    assert places(SEGMENT).tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]
    got = sums(torch.tensor(VALUES).double(), SEGMENT, 4).tolist()
    assert got == pytest.approx([sum(part) for part in PARTS], abs=1e-6)


def test_sums_before_a_token_start_anew_in_each_trajectory():
    expected = [sum(part[:t]) for part in PARTS for t in range(len(part))]
    assert before(torch.tensor(VALUES), SEGMENT).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("window", [0, 1, 2, 5, 100])
def test_the_minimum_ahead_ends_with_the_trajectory(window):
    expected = [min(part[t : t + window + 1]) for part in PARTS for t in range(len(part))]
    assert lookahead_minimum(torch.tensor(VALUES), SEGMENT, window).tolist() == pytest.approx(
        expected
    )


def test_the_minimum_ahead_of_the_published_entropies():
    entropy = torch.tensor([0.05, 2, 1.5, 0.1, 3, 2.8])
    got = lookahead_minimum(entropy, torch.zeros(6, dtype=torch.int64), 2)
    torch.testing.assert_close(got, torch.tensor([0.05, 0.1, 0.1, 0.1, 2.8, 2.8]))


def test_nothing_has_no_places_and_no_sums():
    none, segment = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert (
        len(places(segment))
        == len(before(none, segment))
        == len(lookahead_minimum(none, segment, 3))
        == 0
    )
    assert sums(none, segment, 2).tolist() == [0.0, 0.0]


def test_sums_over_sixteen_thousand_tokens_are_those_of_double_precision():
    generator = torch.Generator().manual_seed(0)
    # far from zero, and then a large one to be lost in
    value_N = torch.rand(16_384, generator=generator)
    value_N[0] = 1e5
    segment_N = torch.zeros(16_384, dtype=torch.int64)
    exact = value_N.double().sum().float()
    assert sums(value_N, segment_N, 1)[0] == exact
    assert before(value_N, segment_N)[-1] == (value_N.double().sum() - value_N[-1].double()).float()


def test_the_ratio_of_a_long_sequence_does_not_gather_rounding():
    step = torch.full((16_384,), 1e-4)
    got = sequence_ratio(step, torch.zeros(16_384), torch.zeros(16_384, dtype=torch.int64), 1)[0]
    assert got.item() == pytest.approx(
        torch.tensor(1e-4).double().mul(16_384).exp().item(), rel=3e-7
    )
