"""How calls travel to an actor: those of one moment together."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from async_opd.core.aio import retrieved
from async_opd.core.ports import Ref, Remote

LINGER_S = 0.005  # how long a call waits for company


class _Batch:
    """Calls that travel together, and on which of them nobody waits any more."""

    def __init__(self) -> None:
        self.args: list[Ref] = []
        self.given_up: set[int] = set()  # their places
        self.sending: asyncio.Task[list[Any]]


class CallBatcher:
    """Calls of the same few milliseconds travel in one remote call, which costs the driver the same
    for one group as for many: prompts that were handed out together tend to finish together."""

    def __init__(
        self,
        send: Callable[[list[Ref]], Awaitable[list[Any]]],
        unwanted: Callable[[Any], None] = lambda result: None,
    ):
        """`send` gives a result or an error for each argument; `unwanted` gets the results that
        nobody waits for any more. Where that is all of them, `send` is cancelled."""
        self._send, self._unwanted = send, unwanted
        self._open: _Batch | None = None  # that others may join

    async def __call__(self, arg: Ref) -> Any:
        """The result for `arg`, raised where it is an error; an error of the call is every
        caller's."""
        if self._open is None:
            self._open = _Batch()
            self._open.sending = retrieved(asyncio.create_task(self._flush(self._open)))
        batch = self._open
        place = len(batch.args)
        batch.args.append(arg)
        try:
            result = (await asyncio.shield(batch.sending))[place]
        except asyncio.CancelledError:
            self._give_up(batch, place)
            raise
        if isinstance(result, Exception):
            raise result
        return result

    def _give_up(self, batch: _Batch, place: int) -> None:
        batch.given_up.add(place)
        sending = batch.sending
        if sending.done():
            if not sending.cancelled() and not sending.exception():
                self._unwanted(sending.result()[place])
        elif len(batch.given_up) == len(batch.args):
            sending.cancel()
            if self._open is batch:
                self._open = None

    async def _flush(self, batch: _Batch) -> list[Any]:
        await asyncio.sleep(LINGER_S)
        self._open = None
        results = await self._send(batch.args)
        for place in batch.given_up:
            self._unwanted(results[place])
        return results


def transport(
    actor: Any, method: str, how: Remote, timeout_s: float | None
) -> Callable[..., Awaitable[Any]]:
    """How a call travels to a `runtime.actors.RemoteActor`, and its result back."""

    async def keeping(*args: Any) -> tuple[Any, ...]:
        first, refs = await actor.call_keeping(timeout_s, how.refs, "call", method, *args)
        return first, *refs

    async def each_kept(args: list[Ref]) -> list[Any]:
        firsts, refs = await actor.call_keeping(None, len(args), "each_kept", method, *args)
        pairs = zip(firsts, refs, strict=True)
        return [pair if isinstance(pair[0], tuple) else pair[0] for pair in pairs]

    async def each(args: list[Ref]) -> list[Any]:
        return await actor.ask_host(None, "each", method, *args, what=method)

    async def late(ticket: str) -> Any:
        if not how.refs:
            return await actor.ask_host(None, "late", ticket, what=method)
        first, refs = await actor.call_keeping(None, how.refs, "late", ticket, what=method)
        return first, *refs

    def unwanted(result: Any) -> None:
        if isinstance(result, str):
            actor.forget(result)

    async def batched(arg: Ref) -> Any:
        result = await together(arg)
        if not isinstance(result, str):
            return result
        try:
            return await late(result)
        except asyncio.CancelledError:
            unwanted(result)
            raise

    if not how.batched:
        return keeping if how.refs else partial(actor.call, timeout_s, method)
    together = CallBatcher(each_kept if how.refs else each, unwanted)
    return batched
