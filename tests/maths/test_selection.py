from fractions import Fraction
from math import ceil

import pytest
import torch

from async_opd.maths.selection import at_random, count, kept, largest, part


@pytest.mark.parametrize("share", ["0.01", "0.2", "0.29", "0.35", "0.5", "0.7", "1"])
def test_shares_are_rounded_half_up_and_are_at_least_one_token(share):
    sizes = range(1, 300)
    expected = [min(n, max(1, int(Fraction(share) * n + Fraction(1, 2)))) for n in sizes]
    assert [count(float(share), n) for n in sizes] == expected
    assert kept(torch.tensor(list(sizes)), float(share)).tolist() == expected


@pytest.mark.parametrize("share", ["0.01", "0.07", "0.1", "0.29", "0.3", "0.5", "0.7", "1"])
def test_a_prefix_is_the_share_rounded_up(share):
    """Exactly: 0.07 · 100 is a hair above 7 in binary."""
    sizes = range(1, 300)
    expected = [ceil(Fraction(share) * n) for n in sizes]
    assert [prefix(n, float(share)).sum().item() for n in sizes] == expected


def test_a_prefix_of_three_tenths_of_eleven_tokens_is_four():
    assert prefix(11, 0.3).tolist() == [True] * 4 + [False] * 7  # 3.3


def prefix(length, share):
    return part(
        torch.zeros(length, dtype=torch.int64), torch.tensor([length]), share=share, end=False
    )


def test_a_share_of_no_tokens_is_none():
    assert count(0.5, 0) == 0 and kept(torch.tensor([0]), 0.5).tolist() == [0]


def test_of_equals_the_first_are_the_largest():
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    assert largest(torch.ones(3), 2).tolist() == [True, True, False]
    assert largest(torch.ones(3), 0).tolist() == [False] * 3


def test_prefixes_and_suffixes_of_a_whole_are_the_whole_and_meet_in_the_middle():
    segment_N, count_S = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([4, 1])
    first, last = (part(segment_N, count_S, share=0.5, end=end) for end in (False, True))
    assert first.tolist() == [True, True, False, False, True]
    assert last.tolist() == [False, False, True, True, True]
    assert part(segment_N, count_S, share=1.0, end=True).all()


def alone(key, length):
    return at_random(torch.zeros(length, dtype=torch.int64), torch.tensor([key]), share=0.3)


def test_what_chance_selects_of_a_trajectory_does_not_depend_on_its_batch():
    keys = [5, 2**32 - 1, 0, 77, *range(100, 400)]
    lengths = [1000, 3, 1, 20_000, *[2] * 300]
    segment_N = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(lengths))
    order = list(reversed(range(len(keys))))
    reversed_N = torch.repeat_interleave(
        torch.arange(len(keys)), torch.tensor([lengths[i] for i in order])
    )
    together = at_random(segment_N, torch.tensor(keys), share=0.3).split(lengths)
    backwards = at_random(reversed_N, torch.tensor([keys[i] for i in order]), share=0.3).split(
        lengths[::-1]
    )
    for i, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        assert torch.equal(together[i], alone(key, length))
        assert torch.equal(backwards[order.index(i)], alone(key, length))


def test_chance_selects_every_place_about_as_often_and_differently_for_each_key():
    keys = torch.arange(4000)
    chosen_KT = at_random(keys.repeat_interleave(20), keys, share=0.25).view(4000, 20)
    assert (chosen_KT.sum(1) == 5).all()
    # 4,000 draws of probability 1/4 are within five standard deviations, 1,000 ± 137, but once in
    # 1.7 million
    assert (chosen_KT.sum(0) - 1000).abs().max() < 137
    assert len({tuple(row) for row in chosen_KT.tolist()}) > 3000  # of 15,504 subsets
