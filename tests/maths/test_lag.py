import numpy as np

from async_opd.maths.lag import fresh, slots


def test_slots_are_one_step_more_than_the_bound():
    assert slots(0, 16) == 16  # strictly synchronous: one step's worth
    assert slots(1, 16) == 32
    assert slots(4, 16) == 80  # (4 + 1) · 16


def test_tokens_at_the_bound_are_fresh_and_older_ones_are_not():
    versions = np.array([3, 4, 5, 9], np.int32)  # lags 6, 5, 4, 0 at version 9
    assert fresh(versions, live=9, max_lag_steps=5).tolist() == [False, True, True, True]
    assert fresh(versions, live=9, max_lag_steps=0).tolist() == [False, False, False, True]
