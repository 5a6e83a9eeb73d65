import asyncio

import pytest

from async_opd.errors import ActorLost
from async_opd.proxies import Together


class Remote:
    """Records each call, and answers in upper case once `go` is set."""

    def __init__(self):
        self.calls, self.go = [], asyncio.Event()
        self.go.set()

    async def __call__(self, items):
        self.calls.append(items)
        await self.go.wait()
        return [item.upper() for item in items]


async def test_requests_of_one_moment_travel_in_one_call_and_get_their_own_results():
    remote = Remote()
    ask = Together(remote)
    assert await asyncio.gather(*map(ask, "abc")) == ["A", "B", "C"]
    assert await ask("d") == "D"
    assert remote.calls == [["a", "b", "c"], ["d"]]


async def test_a_request_that_comes_while_a_call_is_under_way_does_not_wait_for_it():
    remote = Remote()
    remote.go.clear()
    ask = Together(remote)
    first = asyncio.ensure_future(ask("a"))
    await asyncio.sleep(2 * Together.LINGER_S)
    second = asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * Together.LINGER_S)
    assert remote.calls == [["a"], ["b"]]
    remote.go.set()
    assert await asyncio.gather(first, second) == ["A", "B"]


async def test_an_error_of_the_call_is_every_requests_error():
    async def lost(items):
        raise ActorLost("teacher 0 died")

    ask = Together(lost)
    errors = await asyncio.gather(ask("a"), ask("b"), return_exceptions=True)
    assert [str(error) for error in errors] == ["teacher 0 died"] * 2


async def test_a_caller_that_gives_up_takes_nothing_from_the_others():
    remote = Remote()
    remote.go.clear()
    ask = Together(remote)
    first, second = asyncio.ensure_future(ask("a")), asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * Together.LINGER_S)
    first.cancel()
    remote.go.set()
    assert await second == "B"
    with pytest.raises(asyncio.CancelledError):
        await first
