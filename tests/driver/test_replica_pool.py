"""Members that die, stall, come back late, are replaced or not: each provoked, in virtual time."""

import asyncio
import random

import pytest

from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, TimedOut
from async_opd.driver.replica_pool import MAX_FAILED_STARTS, MAX_RETRY_S, ReplicaPool
from tests.simulated.virtual_time import virtual


class Worker:
    """Answers after a second with its name; `dead` workers raise, `silent` ones never answer
    anything."""

    def __init__(self, name: str):
        self.name, self.dead, self.silent, self.killed, self.served = name, False, False, False, []

    async def work(self, item: str) -> str:
        self.served.append(item)
        await asyncio.sleep(10_000 if self.silent else 1)
        await self.check_health()
        return f"{self.name}: {item}"

    async def check_health(self) -> None:
        if self.silent:
            await bounded(asyncio.sleep(10_000), 5, f"{self.name}, sign of life")
        if self.dead:
            raise ActorLost(f"{self.name} died")

    def kill(self) -> None:
        self.killed = True


def ask(pool: ReplicaPool, item: str, **settings) -> asyncio.Task:
    return asyncio.ensure_future(pool.ask(Worker.work, item, **settings))


class Spare:
    """Starts a worker after three seconds; the first `failing` starts fail."""

    def __init__(self, failing: int = 0):
        self.failing, self.started = failing, []

    async def __call__(self, index: int) -> Worker:
        await asyncio.sleep(3)
        if self.failing:
            self.failing -= 1
            raise ActorLost(f"no place for {index}")
        self.started.append(Worker(f"new {index}"))
        return self.started[-1]


def scenario(workers: list[Worker], play, **settings):
    """Run `play(pool, events)` over a watched pool in virtual time; returns its result."""

    async def main():
        events = []
        pool = ReplicaPool(
            "worker", workers, emit=lambda *event: events.append(event[:2]), **settings
        )
        async with asyncio.timeout(20_000), asyncio.TaskGroup() as tasks:
            pool.start(tasks, every_s=1)
            found = await play(pool, events)
            pool.stop()
        return found

    return virtual(main())


def now() -> float:
    return round(asyncio.get_running_loop().time(), 3)


def test_what_a_dead_member_had_is_asked_of_the_others_at_once_and_its_loss_is_told():
    workers, why = [Worker("a"), Worker("b")], []

    async def play(pool, events):
        first, second = ask(pool, "x", lost=why.append), ask(pool, "y")
        await asyncio.sleep(0.5)
        workers[0].dead = True
        return await first, await second, now(), events

    x, y, at, events = scenario(workers, play)
    assert (x, y) == ("b: x", "b: y")
    assert at == 2.0  # lost at 1 s, when it was to answer; asked again then
    assert (workers[0].killed, workers[1].served) == (True, ["y", "x"])
    assert (why, events) == (["a died"], [("lost", "worker 0")])


def test_a_member_that_gives_no_sign_of_life_is_retired_and_its_late_answer_meets_nobody():
    workers = [Worker("a"), Worker("b")]

    async def play(pool, events):
        first = ask(pool, "x")
        workers[0].silent = True
        found = await first, now()
        await asyncio.sleep(20_000 - now() - 1)  # the silent one has answered long ago
        return found

    assert scenario(workers, play) == ("b: x", 7.0)  # a look at 1 s, 5 s of patience, 1 s of work
    assert workers[0].killed


def test_with_nobody_left_calls_wait_for_the_replacement_and_nothing_is_lost():
    worker, spare = Worker("a"), Spare()

    async def play(pool, events):
        asked = [ask(pool, str(i)) for i in range(5)]
        worker.dead = True
        return await asyncio.gather(*asked), now(), events

    answers, at, events = scenario([worker], play, spawn=spare)
    assert answers == [f"new 0: {i}" for i in range(5)]
    assert at == 5.0  # dead at 1 s, 3 s to start, 1 s of work
    assert events == [("lost", "worker 0"), ("none left", "worker"), ("serves", "worker 0")]


def test_without_a_replacement_the_last_one_s_loss_is_every_caller_s():
    worker = Worker("a")
    worker.dead = True

    async def play(pool, events):
        return [
            str(e)
            for e in await asyncio.gather(*(ask(pool, i) for i in "xyz"), return_exceptions=True)
        ]

    assert scenario([worker], play) == ["a died"] * 3


def test_a_new_member_serves_only_after_its_welcome():
    seen, worker = [], Worker("a")

    async def welcome(replica):
        await asyncio.sleep(10)
        seen.append((replica.port.name, list(replica.port.served)))

    async def play(pool, events):
        worker.dead = True
        return await ask(pool, "x"), now()

    assert scenario([worker], play, spawn=Spare(), welcome=welcome) == ("new 0: x", 15.0)
    assert seen == [("new 0", [])]


def test_a_seat_whose_starts_fail_is_tried_again_ever_more_rarely_while_others_serve():
    workers, spare = [Worker("a"), Worker("b")], Spare(failing=12)

    async def play(pool, events):
        workers[0].dead = True
        while len(pool.serving) < 2 or workers[0].killed is False:
            await asyncio.sleep(1)
        return events, [replica.name for replica in pool.serving], now()

    events, serving, at = scenario(workers, play, spawn=spare)
    assert [what for what, _ in events] == ["lost", "did not start", "serves"]  # each said once
    assert serving == ["worker 0", "worker 1"]
    # twelve waits of 1, 2, 4, … s and of five minutes at most, and 13 starts of 3 s
    assert at == pytest.approx(511 + 3 * MAX_RETRY_S + 13 * 3, abs=3)


def test_of_a_pool_that_shrinks_meanwhile_no_start_is_tried_again():
    workers, spare = [Worker("a"), Worker("b")], Spare(failing=100)

    async def play(pool, events):
        workers[1].dead = True
        await asyncio.sleep(50)
        pool.resize(1)
        await asyncio.sleep(100)
        tried = spare.failing
        await asyncio.sleep(1000)
        return tried - spare.failing, events

    tries, events = scenario(workers, play, spawn=spare)
    assert (tries, events[-1]) == (0, ("scaled", "worker"))


def test_once_nobody_serves_starts_that_go_on_failing_end_the_run_by_name():
    workers, spare = [Worker("a"), Worker("b")], Spare(failing=1000)

    async def play(pool, events):
        workers[0].dead = True
        await asyncio.sleep(400)  # long past the first tries
        workers[1].dead = True
        await ask(pool, "x")

    with pytest.RaisesGroup(
        pytest.RaisesExc(ActorLost, match="worker 1: 3 starts in a row failed, the last: no place")
    ):
        scenario(workers, play, spawn=spare)


def test_the_last_seat_s_failed_starts_end_the_run_by_name():
    worker, spare = Worker("a"), Spare(failing=MAX_FAILED_STARTS)
    worker.dead = True

    async def play(pool, events):
        await ask(pool, "x")

    with pytest.RaisesGroup(
        pytest.RaisesExc(ActorLost, match="worker 0: 3 starts in a row failed, the last: no place")
    ):
        scenario([worker], play, spawn=spare)


def test_a_pool_grows_and_shrinks_and_those_who_leave_hand_back_what_they_have():
    workers, spare = [Worker("a"), Worker("b")], Spare()

    async def play(pool, events):
        pool.resize(3)
        await asyncio.sleep(4)
        grown = [replica.name for replica in pool.serving]
        asked = [ask(pool, i) for i in "xyz"]
        await asyncio.sleep(0.5)
        pool.resize(1)
        answers = await asyncio.gather(*asked)
        return (
            grown,
            [replica.name for replica in pool.serving],
            answers,
            [what for what, _ in events],
        )

    grown, left, answers, told = scenario(workers, play, spawn=spare)
    assert (grown, left) == (["worker 0", "worker 1", "worker 2"], ["worker 0"])
    assert answers == ["a: x", "a: y", "a: z"]
    assert told == ["scaled", "serves", "scaled", "lost", "lost"]
    assert workers[1].killed and spare.started[0].killed


def test_a_pool_that_shrinks_while_a_member_starts_does_not_keep_it():
    spare = Spare()

    async def play(pool, events):
        pool.resize(2)
        await asyncio.sleep(1)
        pool.resize(1)
        await asyncio.sleep(10)
        return [replica.name for replica in pool.serving]

    assert scenario([Worker("a")], play, spawn=spare) == ["worker 0"]
    assert [worker.killed for worker in spare.started] == [True]


def test_a_member_that_is_late_with_one_request_is_not_lost():
    class Late(Worker):
        async def work(self, item):
            raise TimedOut("no answer in 9 s")

    async def play(pool, events):
        return await ask(pool, "x"), events

    answer, events = scenario([Late("a"), Worker("b")], play)
    assert (answer, events) == ("b: x", [("refused", "worker 0")])


def test_a_caller_that_gives_up_ends_its_call_and_frees_the_member():
    async def play(pool, events):
        first = ask(pool, "x", load=100)
        await asyncio.sleep(0.5)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await ask(pool, "y")

    assert scenario([Worker("a"), Worker("b")], play) == "a: y"


def test_the_member_with_the_least_in_flight_is_asked_whatever_came_and_went():
    draw, workers = random.Random(0), [Worker(name) for name in "abcde"]

    async def play(pool, events):
        out: dict[asyncio.Task, tuple[str, int]] = {}
        for item in map(str, range(300)):
            loads = {worker.name: 0 for worker in workers}
            for name, load in out.values():
                loads[name] += load
            load = draw.choice((1, 5, 20))
            asking = ask(pool, item, load=load)
            for _ in range(4):
                await asyncio.sleep(0)
            asked = next(worker for worker in workers if item in worker.served)
            assert asked.name == min(loads, key=lambda name: (loads[name], name))
            out[asking] = asked.name, load
            if draw.random() < 0.4:
                await asyncio.sleep(draw.random())
            out = {task: what for task, what in out.items() if not task.done()}
        await asyncio.gather(*out)

    scenario(workers, play)


def test_who_is_to_leave_while_weights_travel_leaves_at_the_end_and_the_dead_at_once():
    workers, spare = [Worker(name) for name in "abc"], Spare()

    async def play(pool, events):
        with pool.updating():
            pool.resize(1)
            pool.dismiss(pool.serving[0], "it fails what others do not")
            during = [replica.name for replica in pool.serving], pool.size, [*events]
            pool.retire(pool.serving[1], "b died")
            at_once = workers[1].killed
            await asyncio.sleep(1)
            kept = [worker.killed for worker in workers]
        after = [worker.killed for worker in workers]
        await asyncio.sleep(5)
        return during, at_once, kept, after, [replica.name for replica in pool.serving]

    during, at_once, kept, after, left = scenario(workers, play, spawn=spare)
    assert during == (["worker 0", "worker 1", "worker 2"], 1, [("scaled", "worker")])
    assert (at_once, kept, after) == (True, [False, True, False], [True, True, True])
    assert left == ["worker 0"]  # the one that is wanted, started anew
    assert [worker.name for worker in spare.started] == ["new 0"]


def test_who_is_wanted_again_before_the_update_ends_stays():
    workers = [Worker("a"), Worker("b")]

    async def play(pool, events):
        with pool.updating():
            pool.resize(1)
            pool.resize(3)
        await asyncio.sleep(4)
        return [replica.name for replica in pool.serving]

    spare = Spare()
    assert scenario(workers, play, spawn=spare) == ["worker 0", "worker 1", "worker 2"]
    assert not workers[1].killed
    assert [worker.name for worker in spare.started] == ["new 2"]


@pytest.mark.parametrize("begins", [0.0, 0.5, 4.0, 5.9])
def test_an_engine_is_not_retired_for_its_silence_in_an_update_however_long(begins):
    """The bound of silence is 5 s, that of the update its own."""
    worker = Worker("a")

    async def play(pool, events):
        await asyncio.sleep(begins)
        with pool.updating():
            worker.silent = True
            await asyncio.sleep(12.3)
        worker.silent = False
        await asyncio.sleep(20)
        return events

    assert scenario([worker], play) == []


def test_one_that_stays_silent_behind_an_update_is_retired():
    worker = Worker("a")

    async def play(pool, events):
        with pool.updating():
            worker.silent = True
            await asyncio.sleep(12.3)
        while not worker.killed:
            await asyncio.sleep(0.5)
        return now()

    assert 17.3 < scenario([worker], play) < 25
