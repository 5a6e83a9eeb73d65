import asyncio

import pytest

from async_opd.core.aio import bounded, first_cause, together
from async_opd.core.errors import ActorLost, TimedOut


async def test_a_wait_that_runs_out_says_who_was_waited_for_and_how_long():
    with pytest.raises(TimedOut, match=r"^generator 3, resume: no answer in 0\.01 s$"):
        await bounded(asyncio.sleep(9), 0.01, "generator 3, resume")


async def test_a_timeout_of_the_awaited_itself_is_not_taken_for_ours():
    async def fails():
        raise TimeoutError("inner")

    with pytest.raises(TimeoutError, match="inner"):
        await bounded(fails(), 5, "anyone")


def test_the_named_error_is_found_inside_nested_groups():
    named = ActorLost("teacher 1 died")
    group = ExceptionGroup("a", [ValueError("x"), ExceptionGroup("b", [KeyError("y"), named])])
    assert first_cause(group) is named


@pytest.mark.parametrize("ends", ["error", "cancelled"])
async def test_what_is_done_together_has_ended_when_one_fails(ends, unheard):
    ended = []

    async def member(name: str):
        try:
            await asyncio.sleep(9)
        finally:
            await asyncio.sleep(0)  # which ending may take
            ended.append(name)

    async def fails():
        await asyncio.sleep(0.01)
        raise ActorLost("teacher 0")

    others = together(member("b"), member("c"))
    calls = together(member("a"), others, *([fails()] if ends == "error" else []))
    whole = asyncio.ensure_future(calls)
    if ends == "cancelled":
        asyncio.get_running_loop().call_later(0.01, whole.cancel)
    with pytest.raises(ActorLost if ends == "error" else asyncio.CancelledError):
        await whole
    assert sorted(ended) == ["a", "b", "c"] and unheard() == []


async def test_what_is_done_together_gives_its_results_in_order():
    async def after(seconds: float):
        await asyncio.sleep(seconds)
        return seconds

    assert await together(after(0.01), after(0.0)) == [0.01, 0.0]
    assert await together() == []
