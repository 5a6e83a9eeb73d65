from math import fsum

import numpy as np
import pytest
import torch

from async_opd.maths.advantages import (
    Moments,
    extrapolated,
    length_aware,
    reverse_kl,
    whitened,
    with_future,
    within_group,
)

NAN = float("nan")
WARM = dict(warmup_steps=10, warmup_mean=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_moments_merged_by_steps_are_those_of_all_values(seed):
    random = np.random.default_rng(seed)
    steps = [random.normal(3, 2, size) for size in (5, 0, 1, 40, 7)]
    moments = Moments()
    for values in steps:
        moments = moments.with_sums(len(values), values.sum(), (values**2).sum())
    everything = np.concatenate(steps)
    assert moments.number == 53
    assert moments.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert moments.std == pytest.approx(everything.std(), rel=1e-12)


def test_moments_are_those_of_welford_one_value_at_a_time():
    values, mean, squares, moments = [1.5, 0.0, 1.2, 0.0, 1.45], 0.0, 0.0, Moments()
    for n, x in enumerate(values, start=1):
        apart = x - mean
        mean += apart / n
        squares += apart * (x - mean)
        moments = moments.with_sums(1, x, x * x)
        assert tuple(moments) == pytest.approx((n, mean, squares), abs=1e-12)


def test_moments_of_equal_values_have_no_spread_however_many():
    moments = Moments()
    for _ in range(1000):
        moments = moments.with_sums(3, 3 * 1.1, 3 * 1.1**2)
    assert moments.mean == pytest.approx(1.1) and moments.std == pytest.approx(0, abs=1e-7)
    assert Moments().std == 0.0


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, [1.0, -0.5, 0.0]),
        (10, [1.0, -0.5, 0.0]),  # 1.5 - .5, 0 - .5
        (11, [2.0, -1.0, 0.0]),  # mean .5 and variance 2/8: (1.5 - .5) / .5, (0 - .5) / .5
    ],
)
def test_rewards_are_whitened_by_past_moments_after_step_ten_and_unknown_ones_are_worth_0(
    step, expected
):
    rewards = torch.tensor([1.5, 0.0, NAN]).double()
    got = whitened(rewards, Moments(8, 0.5, 2.0), step=step, **WARM)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_whitening_by_the_steps_before_equals_numpy():
    random = np.random.default_rng(0)
    past, moments = np.zeros(0), Moments()
    for step in range(1, 15):
        rewards = random.uniform(0, 1.5, 6)
        got = whitened(torch.tensor(rewards), moments, step=step, **WARM).numpy()
        expected = rewards - 0.5 if step <= 10 else (rewards - past.mean()) / (past.std() + 1e-6)
        np.testing.assert_allclose(got, expected, rtol=1e-10)
        past = np.concatenate([past, rewards])
        moments = moments.with_sums(6, rewards.sum(), (rewards**2).sum())


def test_while_all_were_alike_rewards_count_as_in_the_first_steps():
    past = Moments()
    for count in (3, 5, 7):  # of .3: rounding leaves a deviation of 7e-9
        past = past.with_sums(count, 0.3 * count, 0.3**2 * count)
    assert past.std > 0
    got = whitened(torch.tensor([0.3, 0.6]).double(), past, step=11, **WARM)
    assert got.tolist() == pytest.approx([-0.2, 0.1])
    got = whitened(torch.tensor([1.0, 0.0]).double(), Moments(4, 0.0, 0.0), step=11, **WARM)
    assert got.tolist() == [0.5, -0.5]


def test_rewards_within_a_group_are_in_deviations_of_the_known_ones():
    group = [1.0, 1.0, 0.0, 0.0, 0.0, NAN]  # mean .4, deviation √.24
    rewards = torch.tensor([1.0, 0.0, NAN]).double()
    got = within_group(rewards, torch.tensor([group] * 3).double())
    assert got.tolist() == pytest.approx([0.6 / 0.24**0.5, -0.4 / 0.24**0.5, 0.0], abs=1e-5)


def test_rewards_between_0_and_1_are_taken_as_they_are():
    group = [1.0, 0.25, NAN, 0.25]  # mean .5, deviation √.125
    rewards = torch.tensor([1.0, 0.25]).double()
    got = within_group(rewards, torch.tensor([group] * 2).double())
    assert got.tolist() == pytest.approx([0.5 / 0.125**0.5, -0.25 / 0.125**0.5], abs=1e-5)


# the mean of three times .1, and of seven times .7, is not that number
ALIKE = [[1.0] * 7, [0.0] * 3, [1.0, NAN, NAN], [NAN, NAN], [1.0], [0.1] * 3, [0.7] * 7 + [NAN]]


@pytest.mark.parametrize("group", ALIKE, ids=str)
def test_a_group_without_a_contrast_is_worth_exactly_nothing(group):
    assert within_group(torch.tensor([group[0]]), torch.tensor([group])).tolist() == [0.0]


def test_no_trajectories_are_no_advantages():
    assert within_group(torch.zeros(0), torch.zeros(0, 0)).shape == (0,)


def test_a_short_right_answer_is_worth_up_to_one_and_a_half():
    rewards, lengths = torch.tensor([1.0, 1.0, 1.0, 0.0, NAN]), torch.tensor([1, 512, 1024, 1, 5])
    got = length_aware(rewards, lengths, torch.full((5,), 1024.0), bonus=0.5)
    assert (
        got[:4].tolist() == pytest.approx([1.499512, 1.25, 1.0, 0.0], abs=1e-6) and got[4].isnan()
    )


def test_a_share_of_a_reward_is_that_share_of_its_worth():
    got = length_aware(torch.tensor([0.4]), torch.tensor([512]), torch.tensor([1024.0]), bonus=0.5)
    assert got.item() == pytest.approx(0.5)  # .4 · (1 + .5 · .5)


def test_extrapolation_adds_the_teachers_step_from_the_reference():
    student, teacher, reference = torch.tensor([-1.0]), torch.tensor([-0.4]), torch.tensor([-0.8])
    assert reverse_kl(student, teacher).item() == pytest.approx(0.6)
    for lam, expected in ((0.0, 0.2), (1.0, 0.6), (1.5, 0.8)):  # .6 + (λ - 1) · .4
        assert extrapolated(student, teacher, reference, lam=lam).item() == pytest.approx(expected)


def test_the_later_rewards_of_a_long_response_are_those_of_a_loop():
    value_N = -0.2 * torch.rand(16_384, generator=torch.Generator().manual_seed(0))
    got_N = with_future(value_N, torch.zeros(16_384, dtype=torch.int64), 1)
    values = value_N.tolist()
    for later in (1, 2, 3, 100, 10_000):
        expected = values[-later - 1] + fsum(values[-later:]) / later
        assert got_N[-later - 1].item() == pytest.approx(expected, rel=1e-6)
    assert got_N[-1] == value_N[-1]
