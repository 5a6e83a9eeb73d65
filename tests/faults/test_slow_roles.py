"""A role that is ten times slower than the others, in virtual time over the real driver: the others
wait for it, nothing is dropped and nothing piles up."""

import gc
import tracemalloc

import pytest

from tests.simulated.roles import PER_STEP, Pace
from tests.simulated.runs import measure
from tests.simulated.virtual_time import virtual

BOUND, STEPS = 4, 60


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
def test_a_learner_ten_times_slower_holds_generation_back_and_nothing_is_dropped(lengths):
    outstanding, used = [], []  # groups at each row, and bytes at the tenth from either end

    def look(row):
        outstanding.append(row["queue_outstanding"])
        if row["step"] in (10, STEPS - 10):
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])

    pace = Pace.of(0.1, 1, heavy_tail=lengths == "heavy-tailed")
    tracemalloc.start()
    try:
        found = virtual(measure(pace, bound=BOUND, steps=STEPS, sinks=[look]))
    finally:
        tracemalloc.stop()
    assert found["steps"] == STEPS and found["scored_dropped"] == 0
    assert found["max_lag_seen"] <= BOUND
    assert found["generators_blocked"] > 0.5 and found["learner_busy"] > 0.95
    assert max(outstanding) == (BOUND + 1) * PER_STEP
    assert used[1] - used[0] < 60_000  # bytes, in 40 steps of 16 groups


@pytest.mark.parametrize("lengths", ["fixed", "heavy-tailed"])
def test_a_generator_ten_times_slower_starves_the_learner_and_nothing_is_dropped(lengths):
    pace = Pace.of(1, 0.1, heavy_tail=lengths == "heavy-tailed")
    found = virtual(measure(pace, bound=BOUND, steps=STEPS))
    assert found["steps"] == STEPS and found["scored_dropped"] == 0
    assert found["learner_starved"] > 0.8 and found["generators_busy"] > 0.9


@pytest.mark.parametrize("score_s", [3.0, 5.0])
def test_a_healthy_teacher_that_has_minutes_of_groups_before_it_drops_none(score_s):
    steps = 20
    pace = Pace(token_s=0.01, step_s=1.0, score_s=score_s, score_batch=1)
    found = virtual(measure(pace, bound=BOUND, steps=steps, in_actors=True))
    assert found["steps"] == steps and found["scored_dropped"] == 0
    assert "teacher_lost" not in found and found["of_longest"] > 0.97
    assert found["wall_s"] == pytest.approx(score_s * steps * PER_STEP, rel=0.03)


def test_a_healthy_generator_that_has_minutes_of_requests_before_it_is_not_given_up():
    steps = 12
    pace = Pace(token_s=0.1, concurrency=1, step_s=1.0)  # 13 s a request, 80 of them in line
    found = virtual(measure(pace, bound=BOUND, steps=steps, in_actors=True))
    assert found["steps"] == steps and found["scored_dropped"] == 0
    assert "generator_lost" not in found and "dropped_failed" not in found
    assert found["wall_s"] == pytest.approx(12.8 * steps * PER_STEP, rel=0.03)
