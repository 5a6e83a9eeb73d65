"""How long a call may take of an actor that has others before it."""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import TypeVar

from async_opd.core.aio import until
from async_opd.core.errors import TimedOut

T = TypeVar("T")

BEHIND_S = 0.001  # that the first in a line is late before the others
AGAIN_S = 1.0  # between two looks at a call that is held up


class Place:
    """A call without an answer yet, in its line."""

    def __init__(self, line: "Line", kind: str, seconds: float):
        self._all = line
        self._kind, self._seconds = kind, seconds
        self.since = _now()  # its time counts from then, or later
        self.late = False

    def due(self) -> float:
        """When its time is up, in seconds of the running loop; which may move."""
        line, others = self._all, self._all.lines[self._kind]
        if line.beside_it:
            return _now() + AGAIN_S
        if self not in others:  # overtaken
            return self.since + self._seconds
        behind = next(iter(others)) is not self
        return max(self.since, line.moved) + self._seconds + (BEHIND_S if behind else 0.0)

    def expire(self) -> None:
        """Its time is up: those behind it have theirs again, where the actor has got on since the
        last."""
        self.late = True
        self._all.lines[self._kind].pop(self, None)
        if self._all.gets_on:
            self._all.gets_on, self._all.moved = False, _now()


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
        self.lines: dict[str, dict[Place, None]] = {}  # by kind, those not overtaken, in order
        self.moved = 0.0  # when the actor last answered, or was rid of a call
        self.gets_on = True  # it has answered since the last call that was late
        self.beside_it = 0  # calls that wait in no line and hold up those that do

    async def bounded(
        self, call: Awaitable[T], seconds: float, kind: str, who: Callable[[], str]
    ) -> T:
        """Await `call`, one of `kind`. Raises TimedOut, which names `who()`."""
        with self.place(seconds, kind) as place:
            try:
                async with until(place.due, place.expire):
                    return await call
            except TimeoutError:
                if not place.late:
                    raise
                raise TimedOut(f"{who()}: no answer in {seconds:g} s") from None

    @contextmanager
    def place(self, seconds: float, kind: str) -> Generator[Place]:
        """A call of `kind` waits in its line, and is answered behind it, unless it is cancelled or
        was late."""
        line, me = self.lines.setdefault(kind, {}), Place(self, kind, seconds)
        line[me] = None
        answered = True
        try:
            yield me
        except asyncio.CancelledError:
            self.moved = _now()
            answered = False
            raise
        finally:
            if answered:
                self._answered(line, me)
            line.pop(me, None)

    @contextmanager
    def beside(self) -> Generator[None]:
        """A call that waits in no line: those that do may wait for it, for as long as it may
        take."""
        self.beside_it += 1
        try:
            yield
        finally:
            self.beside_it -= 1
            self.moved = _now()

    def _answered(self, line: dict[Place, None], me: Place) -> None:
        if me.late:
            return
        self.gets_on, self.moved = True, _now()
        if me in line:
            for other in [*takewhile(lambda other: other is not me, line)]:
                other.since = self.moved
                del line[other]


def _now() -> float:
    return asyncio.get_running_loop().time()
