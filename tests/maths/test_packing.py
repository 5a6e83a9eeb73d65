from hypothesis import given, settings
from hypothesis import strategies as st

from async_opd.maths.packing import WORTH_A_CALL, padded_groups, plan


def cost(n, width):
    return n * 12 * width + n * n


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    ranks=st.integers(1, 5),
    tokens=st.integers(1, 60),
    width=st.integers(1, 100),
)
@settings(max_examples=200, deadline=None)
def test_a_plan_uses_each_trajectory_once_within_budget_and_in_balance(
    lengths, ranks, tokens, width
):
    planned = plan(lengths, ranks=ranks, tokens=tokens, width=width)
    assert sorted(i for rank in planned for micro in rank for i in micro) == list(
        range(len(lengths))
    )
    assert len(planned) == ranks and len({len(rank) for rank in planned}) == 1 and planned[0]
    for micro in (micro for rank in planned for micro in rank):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= tokens
    load = [sum(cost(lengths[i], width) for micro in rank for i in micro) for rank in planned]
    assert max(load) - min(load) <= max((cost(n, width) for n in lengths), default=0)


def test_short_ones_are_spread_by_tokens_and_long_ones_by_their_square():
    # width 1000: 12,000 n + n², so 40 tokens cost as much as four times 10; width 1: 12 n + n²,
    # 2,080 to 220
    lengths = [40, *[10] * 9]
    wide, narrow = (plan(lengths, ranks=2, tokens=1000, width=width) for width in (1000, 1))
    # 481,600 + 2 · 120,100 = 721,800 | 7 · 120,100 = 840,700
    assert [len(rank[0]) for rank in wide] == [3, 7]
    assert [len(rank[0]) for rank in narrow] == [1, 9]  # 2,080 | 9 · 220 = 1,980


def test_longest_go_first_to_the_lightest_rank():
    # in a wide model cost goes by tokens: 9 → rank 0, 8 → rank 1, 7 → rank 1 (8 < 9), 3 → rank 0 (9
    # < 15), 2 → rank 0 (12 < 15): loads 14 and 15
    assert plan([3, 7, 2, 9, 8], ranks=2, tokens=12, width=1000) == [[[3, 0], [2]], [[4], [1]]]


def test_an_oversize_trajectory_is_alone_and_later_ones_fill_earlier_room():
    # 20 > 10 alone; 6 opens a second; 5 does not fit beside it; 4 does
    assert plan([4, 5, 6, 20], ranks=1, tokens=10, width=1) == [[[3], [2, 0], [1]]]


def test_a_rank_without_trajectories_gets_empty_micro_batches():
    assert plan([5, 5], ranks=3, tokens=5, width=1) == [[[0]], [[1]], [[]]]
    assert plan([], ranks=2, tokens=5, width=1) == [[[]], [[]]]


def places(lengths):
    return sum(len(part) * max(lengths[i] for i in part) for part in padded_groups(lengths))


def test_a_heavy_tail_of_lengths_costs_few_places():
    """85 % short and 15 % long ones beside each other, 2.8 times the work when all are padded to
    the longest; one group, as ever, where all are alike."""
    mixed = [12_000, *[450] * 13]
    assert places(mixed) == sum(mixed) < 0.11 * len(mixed) * max(mixed)
    assert padded_groups([80, 70, 33, 40]) == [[0, 1, 2, 3]]


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_padding_is_at_most_as_much_as_the_tokens_and_a_little_for_each_call(lengths):
    parts = padded_groups(lengths)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert sum(lengths) <= places(lengths)
    wasted = places(lengths) - 2 * sum(lengths)
    assert wasted <= WORTH_A_CALL * len(parts)
