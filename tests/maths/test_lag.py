import numpy as np

from async_opd.maths.lag import fresh, kv_lag, slots


def test_slots_are_so_many_steps_worth_of_groups():
    assert slots(1, 16) == 16
    assert slots(5, 16) == 80
    assert slots(1.15, 100) == 115  # 1.15 * 100 is 114.99999999999999


def test_tokens_at_the_bound_are_fresh_and_older_ones_are_not():
    versions = np.array([3, 4, 5, 9], np.int32)  # lags 6, 5, 4, 0 at version 9
    assert fresh(versions, live=9, max_lag_steps=5).tolist() == [False, True, True, True]
    assert fresh(versions, live=9, max_lag_steps=0).tolist() == [False, False, False, True]


def test_the_lag_of_kept_kv_is_that_of_a_plain_count_over_the_context():
    rng = np.random.default_rng(0)
    for prompt_tokens in (1, 7, 200):
        version_T = np.sort(rng.integers(3, 9, 50)).astype(np.int32)
        expected = []
        for t, version in enumerate(version_T):
            # the KV of a token is computed when the one behind it is sampled
            context = [version_T[0]] * prompt_tokens + [version_T[j + 1] for j in range(t)]
            expected.append(version - np.mean(context))
        np.testing.assert_allclose(kv_lag(version_T, prompt_tokens), expected, atol=1e-6)
