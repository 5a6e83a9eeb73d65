import numpy as np

from async_opd.maths.lag import fresh, slots


def test_slots_are_so_many_steps_worth_of_groups():
    assert slots(1, 16) == 16
    assert slots(5, 16) == 80
    assert slots(1.15, 100) == 115  # 1.15 * 100 is 114.99999999999999


def test_tokens_at_the_bound_are_fresh_and_older_ones_are_not():
    versions = np.array([3, 4, 5, 9], np.int32)  # lags 6, 5, 4, 0 at version 9
    assert fresh(versions, live=9, max_lag_steps=5).tolist() == [False, True, True, True]
    assert fresh(versions, live=9, max_lag_steps=0).tolist() == [False, False, False, True]
