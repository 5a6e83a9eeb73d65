"""A role that is ten times slower than the others, in virtual time over the real driver: the others wait for it,
nothing is dropped and nothing piles up."""

import tracemalloc

import pytest

from benchmarks.paced import PER_STEP, Pace, measure
from tests.fakes import virtual

BOUND, STEPS = 4, 60


def run(pace: Pace):
    """(summary, rows, bytes in use at each row)"""
    rows, used = [], []

    def look(row):
        rows.append(row)
        used.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        return virtual(measure(pace, bound=BOUND, steps=STEPS, sinks=[look])), rows, used
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
def test_a_learner_ten_times_slower_holds_generation_back_and_nothing_is_dropped(lengths):
    found, rows, used = run(Pace.of(0.1, 1, heavy_tail=lengths == "heavy-tailed"))
    assert found["steps"] == STEPS and found["scored_dropped"] == 0
    assert found["max_lag_seen"] <= BOUND
    assert found["generators_blocked"] > 0.7 and found["learner_busy"] > 0.95
    assert max(row["queue_outstanding"] for row in rows) == (BOUND + 1) * PER_STEP
    assert max(used[10:]) - min(used[10:]) < 200_000


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
def test_a_generator_ten_times_slower_starves_the_learner_and_nothing_is_dropped(lengths):
    found, _, _ = run(Pace.of(1, 0.1, heavy_tail=lengths == "heavy-tailed"))
    assert found["steps"] == STEPS and found["scored_dropped"] == 0
    assert found["learner_starved"] > 0.8 and found["generators_busy"] > 0.9
