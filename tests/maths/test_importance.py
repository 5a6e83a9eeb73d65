import pytest
import torch

from async_opd.maths.importance import (
    clipped,
    effective_sample_size,
    geometric_ratio,
    prefix_ratio,
    ratio,
    sequence_ratio,
    truncate,
)


def test_ratio_is_student_over_behaviour():
    student, behaviour = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.2, 0.9]).log()
    torch.testing.assert_close(ratio(student, behaviour), torch.tensor([2.0, 0.5, 1.0]))


def test_bounds_lower_what_is_above_and_drop_what_is_outside():
    rho = torch.tensor([2.0, 0.5, 1.0])
    assert truncate(rho, at_most=1.5, between=None).tolist() == [1.5, 0.5, 1.0]
    assert truncate(rho, at_most=None, between=(0.6, 2.0)).tolist() == [2.0, 0.0, 1.0]


def test_ratios_of_sequences_and_prefixes_are_products_of_their_own_trajectory_only():
    rho = torch.tensor([2.0, 0.5, 4.0, 3.0])
    segment = torch.tensor([0, 0, 0, 1])
    zero = torch.zeros(4)
    torch.testing.assert_close(
        sequence_ratio(rho.log(), zero, segment, 2), torch.tensor([4.0, 4.0, 4.0, 3.0])
    )
    cube = 4 ** (1 / 3)
    torch.testing.assert_close(
        geometric_ratio(rho.log(), zero, segment, 2), torch.tensor([cube, cube, cube, 3.0])
    )
    torch.testing.assert_close(
        prefix_ratio(rho.log(), zero, segment), torch.tensor([1.0, 2.0, 1.0, 1.0])
    )


def test_the_ppo_factor_is_that_of_the_printed_minimum_and_dual_clip():
    rho = torch.tensor([0.5, 0.9, 1.1, 1.5, 9.0]).repeat(2)
    advantage = torch.tensor([2.0] * 5 + [-2.0] * 5)
    printed = torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
    torch.testing.assert_close(
        clipped(rho, advantage, clip=0.2, dual_clip=None) * advantage, printed
    )
    dual = torch.where(advantage < 0, torch.maximum(printed, 3.0 * advantage), printed)
    torch.testing.assert_close(clipped(rho, advantage, clip=0.2, dual_clip=3.0) * advantage, dual)


def test_no_gradient_goes_through_what_ppo_clips():
    rho = torch.tensor([0.5, 1.1, 1.5, 0.5, 1.1, 4.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    (clipped(rho, advantage, clip=0.2, dual_clip=3.0) * advantage).sum().backward()
    assert rho.grad.tolist() == [1.0, 1.0, 0.0, 0.0, -1.0, 0.0]


def test_extreme_log_ratios_stay_finite():
    student, behaviour = torch.tensor([-1e-4, -300.0, -1e30]), torch.tensor([-300.0, -1e-4, -1.0])
    # e^±20
    torch.testing.assert_close(
        ratio(student, behaviour), torch.tensor([4.851652e8, 2.061154e-9, 2.061154e-9])
    )


def test_effective_sample_size_counts_equal_weights_in_full_and_one_heavy_weight_as_one():
    assert effective_sample_size(10.0, 10.0, 10) == 1.0  # (10 · 1)² / (10 · 10 · 1²)
    assert effective_sample_size(7.0, 49.0, 10) == 0.1  # 7² / (10 · 7²)
    assert effective_sample_size(6.0, 14.0, 3) == pytest.approx(36 / 42)  # weights 1, 2, 3
    assert effective_sample_size(0.0, 0.0, 0) == 0.0
