import pytest

from async_opd.maths.schedules import phased_weight


def test_the_weight_of_the_teachers_answers_is_full_then_falls_by_half_a_cosine_to_nothing():
    weights = [phased_weight(t, full_until=30, until=35, start=1.0, end=0.0) for t in range(30, 37)]
    assert weights == pytest.approx([1, 0.904508, 0.654508, 0.345492, 0.095492, 0, 0], abs=1e-6)
    assert weights[5] == 0  # exactly: what has no weight is not trained


def test_a_weight_that_does_not_end_at_0_is_still_0_after_its_last_step():
    weights = [phased_weight(t, full_until=2, until=4, start=3.0, end=1.0) for t in (1, 2, 3, 4, 5)]
    assert weights == [3, 3, 2, 1, 0]  # half way: (3 + 1) / 2


def test_a_weight_may_fall_at_once():
    assert [phased_weight(t, full_until=4, until=4, start=1.0, end=0.5) for t in (4, 5)] == [1, 0]
