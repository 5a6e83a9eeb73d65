"""A port over one actor: which call, which timeout, which results stay where they are."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from async_opd.core.line import Line
from async_opd.core.ports import Remote, declared
from async_opd.runtime.actors import RemoteActor
from async_opd.runtime.batcher import transport


class RemoteRole:
    """A port over one actor: each method that the port declares to be remote is a call of the
    actor's."""

    def __init__(self, actor: RemoteActor, port: type, timeouts: Mapping[str, float]):
        """`timeouts` in seconds, by what `ports.remote` calls them, and "stall"."""
        self._actor, self._stall_s = actor, timeouts["stall"]
        line = Line()
        for method, how in declared(port).items():
            setattr(self, method, _caller(actor, line, method, how, timeouts[how.within]))

    async def check_health(self) -> None:
        """Raise ActorLost or TimedOut where the actor gives no sign of life."""
        await self._actor.ask_host(self._stall_s, "check_health", what="sign of life")

    def kill(self) -> None:
        """End the actor."""
        self._actor.kill()


def _caller(
    actor: RemoteActor, line: Line, method: str, how: Remote, within_s: float
) -> Callable[..., Awaitable[Any]]:
    """What makes the call of an actor as it is declared, and bounds it."""
    timeout_s = None if how.queued else within_s
    call = transport(actor, method, how, timeout_s)
    if not how.queued:

        async def beside(*args: Any) -> Any:
            with line.beside():
                return await call(*args)

        return beside

    async def queued(*args: Any) -> Any:
        return await line.bounded(call(*args), within_s, method, lambda: f"{actor.name}, {method}")

    return queued
