import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from async_opd.core.errors import TimedOut
from async_opd.core.ports import Ready
from async_opd.core.wire import GroupMeta, Prompt, Span
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.teacher_sampling import Taught
from tests.simulated.virtual_time import virtual


def ready(ticket: int, *spans: tuple[int, int], taught_since: int | None = None) -> Ready:
    """A group of one sample whose spans are (version, tokens); the teacher's own where
    `taught_since` is given."""
    at, built = 0, []
    for version, tokens in spans:
        built.append(Span(version=version, start=at, end=at + tokens))
        at += tokens
    meta = GroupMeta(id=str(ticket), prompt_len=1, spans=(tuple(built),), truncated=(False,))
    prompt = Prompt(
        id=str(ticket), ids=np.zeros(1, np.int32), answer="", taught=taught_since is not None
    )
    return Ready(ticket, prompt, meta, None, None, (), (0,), since=taught_since)


def queue_of(
    *items: Ready,
    stale: str = "drop",
    bound: int = 2,
    per_step: int = 2,
    teaches_until: int = 99,
    outstanding: Callable[[], int] = lambda: 99,
    wait_s: float = 60.0,
    told: str = "",
):
    """(queue, [(ticket, cause)] of what it dropped). `told` is what it is told of those that are
    outstanding."""
    dropped = []
    taught = Taught(
        share=0.5,
        weight=lambda step: float(step <= teaches_until),
        generators=[],
        version=lambda: 0,
        outstanding=outstanding,
        keeps_truncated=True,
    )
    queue = TrajectoryQueue(
        groups_per_step=per_step,
        max_lag_steps=bound,
        stale=stale,
        on_drop=lambda ticket, prompt, cause: dropped.append((ticket, cause)),
        wait_s=wait_s,
        taught=taught,
        outstanding=lambda: told,
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

        def _over_age(self, ready):
            self.looks += 1
            return super()._over_age(ready)

    queue = Counting(
        groups_per_step=500, max_lag_steps=1, stale="mask", wait_s=60.0, on_drop=lambda *_: None
    )
    taking = asyncio.ensure_future(queue.take(0))
    for ticket in range(500):
        await asyncio.sleep(0)  # so that each could wake the waiting take
        queue.put(ready(ticket, (0, 1)))
    assert len(await taking) == 500
    assert queue.looks == 500


def test_a_wait_in_which_no_group_comes_ends_by_name_with_what_is_outstanding():
    async def main():
        queue, _ = queue_of(ready(1, (5, 3)), per_step=3, wait_s=10, told="4 of at most 6")
        queue.dropped["truncated"] = 7
        taking = asyncio.ensure_future(queue.take(5))
        await asyncio.sleep(6)
        queue.put(ready(2, (5, 3)))  # the wait begins anew
        await asyncio.sleep(6)
        assert not taking.done()
        queue.drop(3, ready(3, (5, 3)).prompt, 1, "truncated")  # but not for one that is dropped
        said = (
            "no group came in 10 s, 2 of 3 are ready; outstanding: 4 of at most 6; dropped: 8"
            " truncated"
        )
        with pytest.raises(TimedOut, match=said):
            await taking
        assert asyncio.get_running_loop().time() == 16

    virtual(main())


async def test_a_group_leaves_the_queue_once():
    queue, _ = queue_of(ready(1, (0, 1)), ready(2, (0, 1)))
    await queue.take(0)
    assert len(queue) == 0


@pytest.mark.parametrize("stale", ["mask", "drop"])
async def test_what_the_teacher_answered_never_ages_and_takes_its_turn_by_when_it_was_asked(stale):
    first, second, taught = ready(1, (48, 1)), ready(2, (50, 1)), ready(3, (0, 9), taught_since=49)
    queue, dropped = queue_of(second, taught, first, stale=stale)
    assert [r.ticket for r in await queue.take(50)] == [1, 3]
    assert dropped == []


async def test_what_the_teacher_answered_is_late_once_the_next_step_teaches_no_more():
    waiting, own = ready(1, (0, 1), taught_since=0), [ready(ticket, (4, 1)) for ticket in (2, 3, 4)]
    queue, dropped = queue_of(waiting, *own, teaches_until=4)
    assert [r.ticket for r in await queue.take(3)] == [1, 2]  # step 4
    # comes while step 4 is under way, which it has missed
    queue.put(ready(5, (0, 1), taught_since=0))
    assert dropped == []
    assert [r.ticket for r in await queue.take(4)] == [3, 4]
    queue.put(ready(6, (0, 1), taught_since=0))
    assert dropped == [(5, "teacher_late"), (6, "teacher_late")]
    assert queue.dropped == {"teacher_late": 2}


async def test_a_step_takes_at_most_the_teachers_share_while_others_are_to_come():
    queue, _ = queue_of(
        *(ready(ticket, (0, 9), taught_since=0) for ticket in (1, 2, 3)), outstanding=lambda: 5
    )
    taking = asyncio.ensure_future(queue.take(0))
    await asyncio.sleep(0)
    assert not taking.done()  # half of two is one
    queue.put(ready(4, (0, 1)))
    assert [r.ticket for r in await taking] == [1, 4]


async def test_a_step_takes_what_there_is_once_nothing_else_is_to_come():
    own = [ready(ticket, (0, 9), taught_since=0) for ticket in (1, 2)]
    queue, _ = queue_of(*own, outstanding=lambda: 2)
    assert await queue.take(0) == own
    outstanding = [*own, ready(3, (0, 9), taught_since=0)]
    queue, _ = queue_of(*own, outstanding=lambda: len(outstanding))
    taking = asyncio.ensure_future(queue.take(0))
    await asyncio.sleep(0)
    assert not taking.done()
    last = outstanding.pop()
    queue.drop(last.ticket, last.prompt, 1, "teacher_wrong")  # the last that was to come
    assert await taking == own


def test_a_slot_returned_twice_is_an_error():
    slots = Slots(1)
    ticket = slots.take()
    slots.give_back(ticket)
    with pytest.raises(KeyError):
        slots.give_back(ticket)
