"""Replicas of one scorer against one another, in a pool of the real driver over simulated roles."""

import asyncio

import numpy as np
import pytest

from async_opd.core.errors import ActorLost, CallFailed, ScorerDiffers, TimedOut
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.scorer_probe import ScorerProbe
from tests.simulated.roles import SimulatedTeacher
from tests.simulated.virtual_time import virtual

SOUND = np.linspace(-9, -1, 12, dtype=np.float32).reshape(4, 3)


class Teacher(SimulatedTeacher):
    """Answers the probe by what it has next, and goes on with the last; an error is raised."""

    def __init__(self, *answers):
        super().__init__()
        self.answers, self.killed = list(answers), False

    async def probe(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def check_health(self): ...

    def kill(self):
        self.killed = True


def off(nats: float, count: int = 1) -> np.ndarray:
    """Answers of which `count` are so many nats beside the sound ones."""
    answer = SOUND.copy()
    answer.ravel()[:count] -= nats
    return answer


def missing(row: int) -> np.ndarray:
    """The answer of one that cannot score a token."""
    answer = SOUND.copy()
    answer[row] = np.nan
    return answer


def play(teachers, spares=None, *, dtype="float32", moving=False, times=1):
    """(numbers of who serves behind `times` comparisons, events). `spares` take a lost one's
    place, in order."""
    events = []

    async def spawn(index):
        return spares.pop(0)

    async def main():
        probe = ScorerProbe(dtype, moving=moving)
        pool = ReplicaPool(
            "teacher",
            teachers,
            spawn=None if spares is None else spawn,
            welcome=probe.welcome,
            emit=lambda *event: events.append(event),
        )
        async with asyncio.TaskGroup() as tasks:
            pool.start(tasks, every_s=100.0)
            for _ in range(times):
                await probe.compare(pool)
                await asyncio.sleep(20)
            serving = [each.index for each in pool.serving]
            pool.stop()
        return serving

    return virtual(main()), events


@pytest.mark.parametrize(
    ("dtype", "answer", "agrees"),
    [
        ("float32", off(0.0009), True),
        ("float32", off(0.0012), False),
        ("bfloat16", off(1.0), True),  # one of twelve
        ("bfloat16", off(0.19, count=12), True),
        ("bfloat16", off(0.21, count=12), False),
        ("float32", missing(0), False),
        ("bfloat16", missing(0), False),
        ("float32", SOUND[:, :2], False),
    ],
)
def test_one_of_three_that_differs_beyond_the_bound_is_named_and_not_used(dtype, answer, agrees):
    sound, odd = Teacher(SOUND), Teacher(answer)
    serving, events = play([sound, odd, Teacher(SOUND)], dtype=dtype)
    assert serving == ([0, 1, 2] if agrees else [0, 2])
    assert (odd.killed, sound.killed) == (not agrees, False)
    if not agrees:
        ((what, who, why),) = events
        assert (what, who) == ("lost", "teacher 1")
        assert why.startswith("teacher 1: its log-probs are ") and "teacher 0 says" in why


def test_what_no_replica_can_score_is_no_difference():
    assert play([Teacher(missing(1)), Teacher(missing(1))]) == ([0, 1], [])


def test_of_two_the_one_that_does_not_repeat_itself_is_wrong():
    fickle = Teacher(off(1.0), off(2.0))
    serving, ((_, who, why),) = play([fickle, Teacher(SOUND)])
    assert (serving, who) == ([1], "teacher 0") and "in two ways" in why


def test_of_two_that_differ_and_repeat_themselves_the_second_is_replaced():
    odd = Teacher(off(1.0))
    serving, events = play([Teacher(SOUND), odd], [Teacher(SOUND)])
    assert (serving, odd.killed) == ([0, 1], True)
    assert [event[:2] for event in events] == [("lost", "teacher 1"), ("serves", "teacher 1")]
    assert "what teacher 0 says of the probe" in events[0][2]


@pytest.mark.parametrize(
    ("teachers", "spares", "moving", "says"),
    [
        # the replacement is of the other's opinion
        ([SOUND, off(1.0)], [off(1.0)], False, "teacher 1: .* as the one before it"),
        # nobody can take its place
        ([SOUND, off(1.0)], None, False, "teacher 1: .* what teacher 0 says of the probe"),
        ([SOUND, off(1.0)], None, True, "teacher 1: .* what teacher 0 says of the probe"),
    ],
)
def test_where_nobody_can_tell_who_is_right_the_run_ends_by_their_names(
    teachers, spares, moving, says
):
    spares = spares and [Teacher(answer) for answer in spares]
    with pytest.RaisesGroup(pytest.RaisesExc(ScorerDiffers, match=says)):
        play([Teacher(answer) for answer in teachers], spares, moving=moving)


def test_a_replacement_answers_before_it_serves():
    dies = Teacher(SOUND, ActorLost("it died"))
    odd, sound = Teacher(off(1.0)), Teacher(SOUND)
    with pytest.RaisesGroup(pytest.RaisesExc(ScorerDiffers, match="as the one before it")):
        play([Teacher(SOUND), dies], [odd, Teacher(off(1.0))], times=2)
    assert odd.killed
    dies = Teacher(SOUND, ActorLost("it died"))
    serving, events = play([Teacher(SOUND), dies], [Teacher(off(1.0)), sound], times=2)
    assert serving == [0, 1] and not sound.killed
    assert [event[0] for event in events] == ["lost", "did not start", "serves"]


def test_a_model_that_does_not_change_is_held_to_what_it_answered_first():
    fades = Teacher(SOUND, off(1.0))
    assert play([fades], [Teacher(SOUND)], times=2)[0] == [0] and fades.killed
    both = [Teacher(SOUND, off(1.0)), Teacher(SOUND, off(1.0))]
    assert play(both, moving=True, times=2) == ([0, 1], [])  # it follows the student


@pytest.mark.parametrize("error", [TimedOut("late"), CallFailed("out of memory")])
def test_who_is_late_or_cannot_answer_is_not_judged(error):
    assert play([Teacher(SOUND), Teacher(error), Teacher(SOUND)]) == ([0, 1, 2], [])
