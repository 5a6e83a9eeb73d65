"""How long a call may take of an actor that has others before it."""

import asyncio
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import TypeVar

from async_opd.core.aio import bounded_until

T = TypeVar("T")

BEHIND_S = 0.001  # that the first in a line is late before the others
AGAIN_S = 1.0  # between two looks at a call that is held up


class _Call:
    """A call without an answer yet."""

    def __init__(self, since: float):
        self.since = since  # its time counts from then, or later


class Line:
    """Calls of one actor, which takes those of a kind up in the order in which they came, as many
    at a time as it likes. A call has its seconds from when it is taken up; which is not told, so
    they count

    - from when it was made or from the actor's last answer to anything, whichever is later: what
      waits is not late while the actor gets on
    - and from nothing later than the first answer to one of its kind that was made after it:
      overtaken, it must have been taken up

    So an actor is late that answers nothing for as long as one call may take. First to be given up
    is the call that is first in its line; once it no longer holds up the others, these have their
    time again. Where there is no answer then either, they are all late.
    """

    def __init__(self) -> None:
        self._lines: dict[str, dict[_Call, None]] = {}  # by kind, those not overtaken, in order
        self._moved = 0.0  # when the actor last answered, or was rid of a call
        self._gets_on = True  # it has answered since the last call that was late
        self._beside = 0  # calls that wait in no line and hold up those that do

    async def bounded(self, call: Awaitable[T], seconds: float, kind: str, who: str) -> T:
        """Await `call`, one of `kind`. Raises TimedOut, which names `who`."""
        line = self._lines.setdefault(kind, {})
        me = _Call(self._now())
        line[me] = None
        answered = True

        def due() -> float:
            if self._beside:
                return self._now() + AGAIN_S
            if me not in line:  # overtaken
                return me.since + seconds
            behind = next(iter(line)) is not me
            return max(me.since, self._moved) + seconds + (BEHIND_S if behind else 0.0)

        def late() -> None:
            nonlocal answered
            answered = False
            line.pop(me, None)
            if self._gets_on:
                self._gets_on, self._moved = False, self._now()

        try:
            return await bounded_until(call, due, f"{who}: no answer in {seconds:g} s", late)
        except asyncio.CancelledError:
            answered, self._moved = False, self._now()
            raise
        finally:
            if answered:
                self._answered(line, me)
            line.pop(me, None)

    @contextmanager
    def beside(self) -> Generator[None]:
        """A call that waits in no line: those that do may wait for it, for as long as it may
        take."""
        self._beside += 1
        try:
            yield
        finally:
            self._beside -= 1
            self._moved = self._now()

    def _answered(self, line: dict[_Call, None], me: _Call) -> None:
        self._gets_on, self._moved = True, self._now()
        if me in line:
            for other in [*takewhile(lambda other: other is not me, line)]:
                other.since = self._moved
                del line[other]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
