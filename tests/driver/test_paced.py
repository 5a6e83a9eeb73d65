"""What `benchmarks/paced.py` measures, in virtual time: the loop's own waits, without the
machine's."""

import pytest

from tests.simulated.roles import PER_STEP, Pace
from tests.simulated.runs import EDGE, REGIMES, measure
from tests.simulated.virtual_time import virtual


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_run_takes_little_longer_than_its_longest_role_alone(regime, lengths):
    pace = Pace.of(*REGIMES[regime], heavy_tail=lengths == "heavy-tailed")
    found = virtual(measure(pace, bound=4))
    assert found["of_longest"] >= 0.95
    assert found["max_lag_seen"] <= 4
    assert found["scored_dropped"] == 0


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
def test_asynchronous_is_nearly_twice_as_fast_when_generation_and_learning_cost_the_same(lengths):
    pace = Pace.of(1, 1, heavy_tail=lengths == "heavy-tailed")
    together, in_turn = virtual(measure(pace, bound=4)), virtual(measure(pace, bound=0))
    assert together["trajectories_per_s"] / in_turn["trajectories_per_s"] >= 1.8
    assert in_turn["max_lag_seen"] == 0


def test_the_mean_lag_follows_the_admission_limit_while_the_bound_stays():
    found = {}
    for steps in (1, 2, 3.5, 5):
        rows = []
        setting = f"run.max_outstanding_steps={steps}"
        summary = virtual(measure(Pace.of(0.5, 1), setting, bound=4, sinks=[rows.append]))
        assert max(row["queue_outstanding"] for row in rows) == steps * PER_STEP
        assert summary["max_lag_seen"] <= 4 and summary["scored_dropped"] == 0
        found[steps] = sum(row["lag_mean"] for row in rows[EDGE:-EDGE]) / len(rows[EDGE:-EDGE])
    # a learner that never waits: all but a step
    assert found == pytest.approx({1: 0, 2: 1, 3.5: 2.5, 5: 4}, abs=0.05)
