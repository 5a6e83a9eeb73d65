from math import exp

import pytest
import torch

from async_opd.maths.gates import (
    agreement,
    certainty,
    direction,
    drift,
    magnitude,
    prefix_discrepancy,
)


def test_agreement_needs_two_signs():
    trust = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0])
    gap = torch.tensor([0.1, -0.1, 0.1, -0.1, 5.0, 0.0])
    assert agreement(trust, gap).tolist() == [True, False, False, True, False, False]


def test_magnitudes_over_tau_are_scaled_to_it():
    gap = torch.tensor([0.0, 0.5, -1.0, 4.0, -1e30])
    assert magnitude(gap, tau=1.0).tolist() == pytest.approx([1, 1, 1, 0.25, 0], abs=1e-12)
    assert magnitude(gap, tau=2.0)[3].item() == 0.5


def test_directions_are_clipped_and_finite_for_any_gap():
    gap = torch.tensor([0.1, 0.1, 1e4, 1e4, -1e4, 3.0])
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    expected = [exp(0.1), exp(-0.1), 1.2, 0.8, 0.8, 1.0]
    assert direction(gap, sign, clip=0.2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("largest", "expected"),  # γ = 1
    # under one nat it is one
    [(4.0, [1.0, 0.75, 0.1]), (0.2, [1.0, 0.1, 0.1]), (-float("inf"), [1.0, 0.1, 0.1])],
)
def test_certainty_is_in_units_of_the_largest_entropy_or_of_one_nat(largest, expected):
    got = certainty(torch.tensor([0.0, 1.0, 4.0]), torch.tensor(largest), gamma=1.0, floor=0.1)
    assert got.tolist() == pytest.approx(expected)


def test_accumulated_discrepancy_is_counted_before_the_token_and_within_its_trajectory():
    gap, segment = torch.tensor([1.0, -1.0, 2.0, 5.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    got = prefix_discrepancy(gap, segment, 3, gamma=1.0)
    # 0, 1, 2 of 4; 0 of 5; 0 of nothing
    assert got.tolist() == pytest.approx([2, 1.75, 1.5, 2, 2, 2])
    paper = prefix_discrepancy(gap, segment, 3, gamma=1.0, through_last=False)
    assert paper.tolist() == pytest.approx([2, 1.5, 1, 2, 2, 2], abs=1e-6)  # 0, 1, 2 of 2


def test_the_last_of_sixteen_thousand_tokens_has_weight_one_by_the_paper():
    gap = torch.rand(16_384, generator=torch.Generator().manual_seed(0)) + 0.5
    got = prefix_discrepancy(
        gap, torch.zeros(16_384, dtype=torch.int64), 1, gamma=0.5, through_last=False
    )
    assert got[-1].item() == pytest.approx(1.0, abs=2e-7) and (got.diff() <= 0).all()


def test_drift_is_signed_inside_a_block_and_starts_anew_in_each_trajectory():
    drifts = torch.tensor([0.2, -0.2, 0.6, 1.0, 3.0, -0.1])
    got = drift(drifts, torch.zeros(6), torch.tensor([0, 0, 0, 1, 1, 2]), block=2, tau=0.5)
    assert got.tolist() == pytest.approx([1, 1, exp(-0.3), exp(-1.0), exp(-1.0), exp(-0.05)])


def test_the_drift_of_nothing_is_nothing():
    assert drift(
        torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), block=4, tau=1.0
    ).shape == (0,)
