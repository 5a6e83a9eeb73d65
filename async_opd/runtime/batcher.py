"""Calls that travel together."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from async_opd.core.aio import retrieved
from async_opd.core.ports import Ref

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
