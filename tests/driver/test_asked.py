"""Members that refuse or answer in part, and requests that end whom they are asked of, in virtual
time."""

import asyncio
from itertools import pairwise

import pytest

from async_opd.core.errors import ActorLost, CallFailed, Lethal, TimedOut, WireError
from async_opd.driver.replica_pool import ReplicaPool
from tests.driver.test_replica_pool import Worker, ask, now, scenario
from tests.simulated.virtual_time import virtual


class Refuses(Worker):
    """Refuses what it is asked until then, or, of all, some items."""

    def __init__(self, name: str, until: float = 10**9, items: str = ""):
        super().__init__(name)
        self.until, self.items, self.times = until, items, []

    async def work(self, item):
        if now() < self.until and (not self.items or item in self.items):
            self.times.append(now())
            raise CallFailed(f"{self.name}: no {item}")
        return await super().work(item)


def test_what_one_refuses_another_answers_and_the_first_time_is_said():
    workers = [Refuses("a", items="xy"), Worker("b")]

    async def play(pool, events):
        return await asyncio.gather(*(ask(pool, item) for item in "xyz")), events

    assert scenario(workers, play) == (
        ["b: x", "b: y", "a: z"],
        [("refused", "worker 0")],
    )


def test_who_refuses_draws_no_load_is_asked_ever_more_rarely_and_is_replaced_in_the_end():
    workers, answers = [Refuses("a"), Worker("b")], []

    async def play(pool, events):
        asking = []
        for item in range(400):  # ten a second
            asking.append(ask(pool, f"{item}"))
            await asyncio.sleep(0.1)
        answers.extend(await asyncio.gather(*asking))
        return events

    events = scenario(workers, play)
    assert len(answers) == 400 and {answer[0] for answer in answers} == {"b"}
    waits = [b - a for a, b in pairwise(workers[0].times)]
    assert len(waits) <= 8 and all(a <= b for a, b in pairwise(waits))
    assert events == [("refused", "worker 0"), ("lost", "worker 0")] and workers[0].killed


def test_who_answers_again_is_a_member_as_before():
    workers = [Refuses("a", until=0.35), Worker("b")]

    async def play(pool, events):
        for item in range(20):
            ask(pool, f"{item}")
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        later = await asyncio.gather(*(ask(pool, "later") for _ in range(8)))
        return sorted(later), events

    later, events = scenario(workers, play)
    assert later == ["a: later"] * 4 + ["b: later"] * 4
    assert events == [("refused", "worker 0")]


def test_what_all_refuse_is_the_caller_s_and_nobody_s_fault():
    workers = [Refuses(name, items="x") for name in "ab"]

    async def play(pool, events):
        refused = [ask(pool, "x") for _ in range(20)]
        answered = [ask(pool, "y") for _ in range(20)]
        await asyncio.gather(*answered)
        return await asyncio.gather(*refused, return_exceptions=True), events

    errors, events = scenario(workers, play)
    assert {type(error) for error in errors} == {CallFailed}
    assert {str(error)[:6] for error in errors} == {"work :"} and "no x" in str(errors[0])
    assert [event[0] for event in events] == ["refused"]


def test_a_role_that_refuses_everything_is_asked_once_in_ever_longer_whiles():
    worker = Refuses("a")

    async def play(pool, events):
        for _ in range(12):
            with pytest.raises(CallFailed, match="a: no x"):
                await ask(pool, "x")
        return now()

    scenario([worker], play)
    waits = [b - a for a, b in pairwise(worker.times)]
    # the first in four tries, each other in one
    assert waits == pytest.approx([min(0.1 * 2**n, 60) for n in range(3 + 11)], abs=0.01)


class Partly(Worker):
    """Its answers say how many of three parts failed."""

    def __init__(self, name: str, failed: int):
        super().__init__(name)
        self.failed = failed

    async def work(self, item):
        await super().work(item)
        return self.name, self.failed


def parts(answer):
    if answer[1] == 3:
        raise WireError("no answer at all")
    return ["nan"] * answer[1]


@pytest.mark.parametrize(
    ("failed", "best"), [((1, 0), "b"), ((1, 2), "a"), ((2, 1), "b"), ((1, 3), "a"), ((3, 0), "b")]
)
def test_of_two_answers_the_one_with_fewer_failed_parts_counts(failed, best):
    workers = [Partly(name, count) for name, count in zip("ab", failed, strict=True)]

    async def play(pool, events):
        return await ask(pool, "x", unsound=parts)

    assert scenario(workers, play) == (best, failed["ab".index(best)])


def test_an_answer_in_part_is_kept_where_nobody_gives_a_better_one():
    workers = [Partly("a", 1), Partly("b", 0)]
    workers[1].dead = True

    async def play(pool, events):
        return await ask(pool, "x", unsound=parts), events

    assert scenario(workers, play) == (("a", 1), [("lost", "worker 1")])


def test_who_fails_parts_of_all_that_others_answer_whole_is_replaced():
    workers = [Partly("a", 1), Partly("b", 0)]

    async def play(pool, events):
        for _ in range(30):
            await ask(pool, "x", unsound=parts)
        return events

    assert scenario(workers, play) == [("lost", "worker 0")]


def test_while_the_others_are_left_alone_an_answer_in_part_is_asked_for_once_more_at_most():
    workers = [Partly("a", 1), Refuses("b", until=1e9)]

    async def play(pool, events):
        pool.serving[1].standing.not_before = now() + 60
        return await ask(pool, "x", unsound=parts), workers[0].served

    assert scenario(workers, play) == (("a", 1), ["x", "x"])


class Late(Worker):
    """Lives, and answers nothing of what takes ten seconds; or all but some items."""

    def __init__(self, name: str, items: str = ""):
        super().__init__(name)
        self.items = items

    async def work(self, item):
        if self.items and item not in self.items:
            return await super().work(item)
        await asyncio.sleep(10)
        raise TimedOut(f"{self.name}: no answer in 10 s")


@pytest.mark.parametrize("asked", [1, 2, 40])
def test_one_that_lives_and_answers_nothing_is_replaced_though_late_ones_are_not(asked):
    async def spawn(index):
        await asyncio.sleep(3)
        return Worker("new")

    async def play(pool, events):
        answers = [ask(pool, f"{item}", of=f"{item}") for item in range(asked)]
        answers = await asyncio.gather(*answers, return_exceptions=True)
        return answers, events, await ask(pool, "later")

    settings = dict(spawn=spawn)
    answers, events, later = scenario([Late("a")], play, **settings)
    assert (events.count(("lost", "worker 0")), later) == (1, "new: later")
    failed = [each for each in answers if isinstance(each, Exception)]
    assert len(failed) == (asked == 1)  # which has had its four tries


def test_one_that_is_late_with_some_calls_and_answers_others_stays():
    async def play(pool, events):
        late = [ask(pool, "x", of=f"{item}") for item in range(40)]
        for item in range(60):
            await ask(pool, f"{item}", of=f"y{item}")
        errors = await asyncio.gather(*late, return_exceptions=True)
        assert {type(error) for error in errors} == {CallFailed}
        return events

    events = scenario([Late("a", items="x")], play)
    assert events == [("refused", "worker 0")]


class Mortal(Worker):
    """Dies of some items, after half of what they take, and of what it has in flight then."""

    deadly = "x"

    def __init__(self, name: str):
        super().__init__(name)
        self.died, self.flying, self.beside = asyncio.Event(), [], {}

    async def work(self, item):
        self.flying.append(item)
        self.served.append(item)
        answer = asyncio.ensure_future(asyncio.sleep(1))
        if item in self.deadly:
            asyncio.get_running_loop().call_later(0.5, self.died.set)
        death = asyncio.ensure_future(self.died.wait())
        await asyncio.wait((answer, death), return_when=asyncio.FIRST_COMPLETED)
        self.beside[item] = list(self.flying)
        await asyncio.sleep(0)
        self.flying.remove(item)
        answer.cancel()
        death.cancel()
        if self.died.is_set():
            raise ActorLost(f"{self.name} died")
        return f"{self.name}: {item}"

    async def check_health(self): ...


def mortals(count: int, play, deadly: str = "x", start_s: float = 3.0):
    """`scenario` over so many who die of `deadly` items; (result, everybody)."""
    everybody = []

    def born():
        everybody.append(Mortal(f"{len(everybody)}"))
        everybody[-1].deadly = deadly
        return everybody[-1]

    async def spawn(index):
        await asyncio.sleep(start_s)
        return born()

    return scenario([born() for _ in range(count)], play, spawn=spawn), everybody


@pytest.mark.parametrize("members", [1, 2, 3])
def test_what_ends_members_costs_three_the_last_alone_and_nobody_beside_it(members):
    items = [*map(str, range(20)), "x", *map(str, range(20, 40))]

    async def play(pool, events):
        asked = [ask(pool, item, of=f"{item}@0") for item in items]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for known in ("x@0", "x@1"):  # from now on, in another epoch, too
            with pytest.raises(Lethal):
                await ask(pool, "x", of=known)
        return answers, pool.lost, await ask(pool, "later", of="later")

    (answers, lost, later), everybody = mortals(members, play)
    failed = [answer for answer in answers if isinstance(answer, Exception)]
    assert lost <= 3 and later.endswith("later")
    (error,) = failed
    assert isinstance(error, Lethal) and "x@0: it ends whom it is asked of: 3 were" in str(error)
    assert sorted(answer.split()[1] for answer in answers if answer is not error) == sorted(
        set(items) - {"x"}
    )
    assert ["x"] in [each.beside.get("x") for each in everybody]


def test_two_that_end_members_are_both_found():
    items = [*map(str, range(10)), "x", *map(str, range(10, 20)), "y", *map(str, range(20, 40))]

    async def play(pool, events):
        asked = [ask(pool, item, of=item) for item in items]
        return await asyncio.gather(*asked, return_exceptions=True), pool.lost

    (answers, lost), _ = mortals(2, play, deadly="xy")
    failed = [str(answer)[0] for answer in answers if isinstance(answer, Exception)]
    assert sorted(failed) == ["x", "y"] and lost <= 6


def test_while_one_is_asked_for_alone_the_others_go_on_elsewhere():
    async def play(pool, events):
        first = ask(pool, "x", of="x")
        while pool.lost < 2:
            await asyncio.sleep(0.1)
        others = [ask(pool, f"{item}", of=f"{item}") for item in range(50)]
        with pytest.raises(Lethal):
            await first
        return now(), len(await asyncio.gather(*others))

    (died, answered), everybody = mortals(3, play, start_s=1000.0)
    assert answered == 50 and died < 10
    assert everybody[2].beside["x"] == ["x"]


def test_members_that_go_for_another_reason_make_nobody_suspect():
    async def play(pool, events):
        asked = [ask(pool, f"{item}", of=f"{item}") for item in range(12)]
        for _ in range(4):
            await asyncio.sleep(0.3)
            pool.retire(pool.serving[0], "it differs", blameless=True)
        return sorted(len(request.lost_with) for request in pool._requests), asked

    async def whole(pool, events):
        suspected, asked = await play(pool, events)
        return suspected, await asyncio.gather(*asked)

    (suspected, answers), _ = mortals(6, whole)
    assert len(answers) == 12 and set(suspected) <= {0}


def test_who_waits_for_its_turn_alone_and_is_cancelled_keeps_nobody_waiting():
    async def play(pool, events):
        first = ask(pool, "x", of="x")
        while pool.lost < 2:
            await asyncio.sleep(0.1)
        busy = ask(pool, "busy", of="busy")
        await asyncio.sleep(3.2)
        first.cancel()
        await asyncio.sleep(0)
        return await asyncio.gather(busy, *(ask(pool, item, of=item) for item in "abc"))

    (answers, _) = mortals(1, play)
    assert [answer.split()[1] for answer in answers] == ["busy", "a", "b", "c"]


def test_a_pool_without_anybody_to_come_ends_what_asks_it_by_name():
    async def main():
        pool = ReplicaPool("worker", [Mortal("a"), Mortal("b")])
        with pytest.raises(ActorLost, match="died"):
            await pool.ask(Worker.work, "x", of="x")

    virtual(main())
