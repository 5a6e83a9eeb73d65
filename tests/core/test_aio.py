import asyncio

import pytest

from async_opd.core.aio import bounded, first_cause
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
