import asyncio

import numpy as np
import pytest

from async_opd.core.errors import DataError, TimedOut
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import GroupMeta, Prompt, Span
from async_opd.driver.admission import Supply
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.roles.teacher.config import TeacherSamplingConfig
from tests.simulated.virtual_time import virtual


def ready(ticket: int, *spans: tuple[int, int], asked_at: int | None = None) -> ScoredGroup:
    """A group of one sample whose spans are (version, tokens); the teacher's own answer where
    `asked_at` is the version at which it was asked."""
    end, built = 0, []
    for version, tokens in spans:
        built.append(Span(version=version, start=end, end=end + tokens))
        end += tokens
    meta = GroupMeta(id=str(ticket), prompt_len=1, spans=(tuple(built),), truncated=(False,))
    return ScoredGroup(
        ticket=ticket,
        prompt=Prompt(id=str(ticket), ids=np.zeros(1, np.int32), answer=""),
        meta=meta,
        group=None,
        scores=None,
        verdicts=(),
        samples=(0,),
        since=meta.oldest if asked_at is None else asked_at,
        from_teacher=asked_at is not None,
    )


def taken(count: int) -> Slots:
    """Slots of which the first `count` are taken."""
    slots = Slots(99)
    for _ in range(count):
        slots.take()
    return slots


def queue_of(
    *items: ScoredGroup,
    stale: str = "drop",
    bound: int = 2,
    per_step: int = 2,
    trained_until: int = 99,
    slots: Slots | None = None,
    wait_s: float = 60.0,
    where: str = "",
):
    """(queue, [(ticket, cause)] of what it dropped). `where` is what it is told of those that are
    outstanding."""
    dropped = []
    queue = TrajectoryQueue(
        groups_per_step=per_step,
        max_lag_steps=bound,
        stale=stale,
        on_drop=lambda ticket, prompt, cause: dropped.append((ticket, cause)),
        slots=slots or taken(99),
        wait_s=wait_s,
        teacher=TeacherSamplingConfig(
            share=0.5, full_until_step=trained_until, until_step=trained_until
        ),
        where=lambda: where,
    )
    for item in items:
        queue.put(item)
    return queue, dropped


async def test_the_oldest_version_leaves_first_and_a_batch_is_in_order_of_admission():
    queue, _ = queue_of(ready(1, (5, 3)), ready(3, (4, 3)), ready(2, (5, 3)))
    assert [r.ticket for r in await queue.take(5)] == [1, 3]  # 3 is older, 1 was admitted before 2


async def test_drop_refuses_a_group_with_one_token_over_the_bound():
    queue, dropped = queue_of(ready(1, (2, 1), (5, 9)), ready(2, (3, 5)), ready(3, (5, 5)))
    assert [r.ticket for r in await queue.take(5)] == [2, 3]
    assert dropped == [(1, "stale")]
    assert queue.dropped == {"stale": 1}


async def test_mask_refuses_only_a_group_with_no_token_inside_the_bound():
    queue, dropped = queue_of(
        ready(1, (2, 1), (5, 9)), ready(2, (2, 5)), ready(3, (5, 5)), stale="mask"
    )
    assert [r.ticket for r in await queue.take(5)] == [1, 3]
    assert dropped == [(2, "stale")]


async def test_take_waits_until_a_whole_step_is_there():
    queue, _ = queue_of(ready(1, (0, 1)))
    taking = asyncio.ensure_future(queue.take(0))
    await asyncio.sleep(0)
    assert not taking.done()
    queue.put(ready(2, (0, 1)))
    assert len(await taking) == 2


async def test_a_group_that_arrives_over_age_is_dropped_at_once_while_take_waits():
    queue, dropped = queue_of(ready(1, (5, 3)))
    taking = asyncio.ensure_future(queue.take(5))
    await asyncio.sleep(0)
    queue.put(ready(2, (2, 3)))
    assert dropped == [(2, "stale")]
    queue.put(ready(3, (3, 3)))
    assert [r.ticket for r in await taking] == [1, 3]


async def test_a_group_that_ages_in_the_queue_is_dropped_by_the_next_take():
    queue, dropped = queue_of(ready(1, (0, 3)), ready(2, (3, 3)), ready(3, (3, 3)))
    assert [r.ticket for r in await queue.take(3)] == [2, 3]
    assert dropped == [(1, "stale")]


async def test_each_group_is_looked_at_once_a_step_however_many_arrive_one_by_one():
    class Counting(TrajectoryQueue):
        looks = 0

        def _over_age(self, group):
            self.looks += 1
            return super()._over_age(group)

    queue = Counting(
        groups_per_step=500,
        max_lag_steps=1,
        stale="mask",
        on_drop=lambda *_: None,
        slots=taken(99),
        wait_s=60.0,
    )
    taking = asyncio.ensure_future(queue.take(0))
    for ticket in range(500):
        await asyncio.sleep(0)  # so that each could wake the waiting take
        queue.put(ready(ticket, (0, 1)))
    assert len(await taking) == 500
    assert queue.looks == 500


def test_a_wait_in_which_no_group_comes_ends_by_name_with_what_is_outstanding():
    async def main():
        queue, _ = queue_of(ready(1, (5, 3)), per_step=3, wait_s=10, where="4 of at most 6")
        queue.dropped["truncated"] = 7
        taking = asyncio.ensure_future(queue.take(5))
        await asyncio.sleep(6)
        queue.put(ready(2, (5, 3)))  # the wait begins anew
        await asyncio.sleep(6)
        assert not taking.done()
        queue.drop(3, ready(3, (5, 3)).prompt, 1, "truncated")  # but not for one that is dropped
        message = (
            "no group came in 10 s, 2 of 3 are ready; outstanding: 4 of at most 6; dropped: 8"
            " truncated"
        )
        with pytest.raises(TimedOut, match=message):
            await taking
        assert asyncio.get_running_loop().time() == 16

    virtual(main())


def test_a_wait_goes_on_while_roles_answer():
    async def main():
        queue, _ = queue_of(per_step=1, wait_s=10)
        queue.answered = lambda: 25.0
        with pytest.raises(TimedOut, match="no group came in 10 s"):
            await queue.take(5)
        assert asyncio.get_running_loop().time() == 35

    virtual(main())


async def test_a_group_leaves_the_queue_once():
    queue, _ = queue_of(ready(1, (0, 1)), ready(2, (0, 1)))
    await queue.take(0)
    assert len(queue) == 0


@pytest.mark.parametrize("stale", ["mask", "drop"])
async def test_what_the_teacher_answered_never_ages_and_takes_its_turn_by_when_it_was_asked(stale):
    first, second, answered = ready(1, (48, 1)), ready(2, (50, 1)), ready(3, (0, 9), asked_at=49)
    queue, dropped = queue_of(second, answered, first, stale=stale)
    assert [r.ticket for r in await queue.take(50)] == [1, 3]
    assert dropped == []


async def test_what_the_teacher_answered_is_late_once_the_next_step_teaches_no_more():
    waiting, own = ready(1, (0, 1), asked_at=0), [ready(ticket, (4, 1)) for ticket in (2, 3, 4)]
    queue, dropped = queue_of(waiting, *own, trained_until=4)
    assert [r.ticket for r in await queue.take(3)] == [1, 2]  # step 4
    # comes while step 4 is under way, which it has missed
    queue.put(ready(5, (0, 1), asked_at=0))
    assert dropped == []
    assert [r.ticket for r in await queue.take(4)] == [3, 4]
    queue.put(ready(6, (0, 1), asked_at=0))
    assert dropped == [(5, "teacher_late"), (6, "teacher_late")]
    assert queue.dropped == {"teacher_late": 2}


async def test_a_step_takes_at_most_the_teachers_share_while_others_are_to_come():
    queue, _ = queue_of(
        *(ready(ticket, (0, 9), asked_at=0) for ticket in (1, 2, 3)), slots=taken(5)
    )
    taking = asyncio.ensure_future(queue.take(0))
    await asyncio.sleep(0)
    assert not taking.done()  # half of two is one
    queue.put(ready(4, (0, 1)))
    assert [r.ticket for r in await taking] == [1, 4]


async def test_a_step_takes_what_there_is_once_nothing_else_is_to_come():
    answers = [ready(ticket, (0, 9), asked_at=0) for ticket in (1, 2)]
    queue, _ = queue_of(*answers, slots=taken(2))
    assert await queue.take(0) == answers
    slots, last = taken(3), ready(3, (0, 9), asked_at=0)
    queue, _ = queue_of(*answers, slots=slots)
    taking = asyncio.ensure_future(queue.take(0))
    await asyncio.sleep(0)
    assert not taking.done()
    slots.give_back(3)
    queue.drop(last.ticket, last.prompt, 1, "teacher_wrong")  # the last that was to come
    assert await taking == answers


def test_rows_that_end_beside_what_is_trained_and_not_published_end_the_run_at_once():
    slots = Slots(8)
    tickets = [slots.take() for _ in range(8)]
    slots.train(tickets[:4])
    supply = Supply(iter(()), slots, per_step=4, emit=lambda what, who, why: None)
    assert next(supply) is None  # the other four fill a step
    slots.give_back(tickets[7])
    with pytest.raises(DataError, match="used up"):
        next(supply)
    slots.publish()
    assert (slots.outstanding, slots.untrained, slots.free) == (3, 3, 5)
