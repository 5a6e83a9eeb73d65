"""Calls of an actor that has others before them, in virtual time."""

import asyncio

import pytest

from async_opd.core.errors import CallFailed, TimedOut
from async_opd.core.line import Line
from tests.simulated.virtual_time import virtual

WITHIN_S = 10.0


class Actor:
    """Takes calls up in their order, `places` at a time; each says how long it takes."""

    def __init__(self, places: int = 1):
        self.line = Line()
        self._places = asyncio.Semaphore(places)
        self.cancelled = []

    def call(self, name, seconds, kind="score"):
        async def made():
            try:
                async with self._places:
                    await asyncio.sleep(seconds)
                    if name == "refused":
                        raise CallFailed(name)
                    return name, self.now
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise

        return asyncio.ensure_future(
            self.line.bounded(made(), WITHIN_S, kind, lambda: f"actor, {name}")
        )

    @property
    def now(self):
        return asyncio.get_running_loop().time()


async def outcomes(*calls):
    return await asyncio.gather(*calls, return_exceptions=True)


def test_a_call_that_waits_for_others_has_its_time_once_it_is_taken_up():
    async def main():
        actor = Actor()
        found = await outcomes(*(actor.call(n, 9.0) for n in range(20)))
        assert found == [(n, 9.0 * (n + 1)) for n in range(20)]

    virtual(main())


def test_one_that_hangs_is_late_alone_and_is_cancelled_and_those_behind_have_their_time_again():
    async def main():
        actor = Actor()
        calls = actor.call("a", 9.0), actor.call("b", 1e9), actor.call("c", 9.0)
        (*_, a), b, (*_, c) = await outcomes(*calls)
        assert type(b) is TimedOut and f"{b}" == "actor, b: no answer in 10 s"
        assert (a, c) == (9.0, 9.0 + WITHIN_S + 9.0) and actor.cancelled == ["b"]

    virtual(main())


def test_an_actor_that_answers_nobody_is_late_with_all_after_twice_that_time():
    async def main():
        actor = Actor(places=4)
        found = await outcomes(*(actor.call(n, 1e9) for n in range(20)))
        assert {type(each) for each in found} == {TimedOut}
        assert actor.now == pytest.approx(2 * WITHIN_S, abs=0.1)

    virtual(main())


def test_one_that_was_overtaken_is_late_though_the_actor_gets_on():
    async def main():
        actor = Actor(places=2)
        hangs = actor.call("hangs", 1e9)
        others = [actor.call(n, 4.0) for n in range(20)]
        with pytest.raises(TimedOut, match=r"^actor, hangs: no answer in 10 s$"):
            await hangs
        assert actor.now == 4.0 + WITHIN_S
        assert not any(isinstance(each, Exception) for each in await outcomes(*others))

    virtual(main())


def test_answers_to_calls_of_another_kind_overtake_nobody_but_tell_that_the_actor_gets_on():
    async def main():
        actor = Actor()
        first = [actor.call(n, 4.0, kind="respond") for n in range(5)]
        score = actor.call("score", 9.0)
        last = [actor.call(n, 1.0, kind="respond") for n in range(5)]
        assert await score == ("score", 29.0)
        await outcomes(*first, *last)

    virtual(main())


def test_an_error_is_an_answer():
    async def main():
        actor = Actor()
        refused, other = actor.call("refused", 9.0), actor.call("other", 9.0)
        assert type((await outcomes(refused))[0]) is CallFailed and await other == ("other", 18.0)

    virtual(main())


def test_a_call_outside_of_the_line_holds_up_those_in_it():
    async def main():
        actor = Actor()
        with actor.line.beside():
            call = actor.call("score", 45.0)
            await asyncio.sleep(40)
        assert await call == ("score", 45.0)

    virtual(main())


def test_who_gives_up_first_in_the_line_leaves_the_others_their_time():
    async def main():
        actor = Actor()
        hangs, other = actor.call("hangs", 1e9), actor.call("other", 9.0)
        await asyncio.sleep(9)
        hangs.cancel()
        assert await other == ("other", 18.0) and actor.cancelled == ["hangs"]

    virtual(main())
