import pytest
import torch

from async_opd.maths.importance import effective_sample_size, ratio


def test_ratio_is_student_over_behaviour():
    student, behaviour = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.2, 0.9]).log()
    torch.testing.assert_close(ratio(student, behaviour), torch.tensor([2.0, 0.5, 1.0]))


def test_truncation_lowers_what_is_above_and_leaves_the_rest():
    student, behaviour = torch.tensor([0.5, 0.1, 0.9]).log(), torch.tensor([0.25, 0.2, 0.9]).log()
    torch.testing.assert_close(ratio(student, behaviour, truncate=1.5), torch.tensor([1.5, 0.5, 1.0]))


@pytest.mark.parametrize("truncate", [None, 5.0])
def test_no_gradient_goes_through_the_ratio(truncate):
    student = torch.tensor([-1.0], requires_grad=True)
    assert not ratio(student, torch.tensor([-2.0]), truncate=truncate).requires_grad


def test_extreme_log_ratios_stay_finite():
    student, behaviour = torch.tensor([-1e-4, -300.0, -1e30]), torch.tensor([-300.0, -1e-4, -1.0])
    torch.testing.assert_close(ratio(student, behaviour), torch.tensor([4.851652e8, 2.061154e-9, 2.061154e-9]))  # e^±20


def test_effective_sample_size_counts_equal_weights_in_full_and_one_heavy_weight_as_one():
    assert effective_sample_size(10.0, 10.0, 10) == 1.0  # (10 · 1)² / (10 · 10 · 1²)
    assert effective_sample_size(7.0, 49.0, 10) == 0.1  # 7² / (10 · 7²)
    assert effective_sample_size(6.0, 14.0, 3) == pytest.approx(36 / 42)  # weights 1, 2, 3
    assert effective_sample_size(0.0, 0.0, 0) == 0.0
