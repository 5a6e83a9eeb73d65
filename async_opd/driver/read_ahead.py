"""Prompts rendered and tokenized beside the event loop, before they are wanted."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from async_opd.core.aio import bounded, retrieved
from async_opd.core.aside import DaemonThread
from async_opd.core.errors import AsyncOpdError, DataError, TimedOut
from async_opd.core.wire import Prompt
from async_opd.driver.resume import Source

PART_S = 0.1
LEAVE_S = 5.0  # in which a row is read that somebody waited for who was cancelled
Failure = AsyncOpdError | StopIteration
Read = tuple[Prompt | Failure, dict[str, Any]]  # with the source's position behind it


class ReadAhead:
    """A `Source` over another, of which a thread reads what comes next. What is read and not handed
    out does not count: `position` is behind the last prompt that was, and a row's error is raised
    where its prompt would have been handed out."""

    def __init__(self, source: Source, most: int, row_s: float):
        """`most` are read beside everything else. A row takes at most `row_s`."""
        self._source, self._most = source, most
        self._row_s = row_s
        self._thread = DaemonThread("read ahead")
        self._rows = iter(source)
        self._ready: deque[Read] = deque()
        self._turn = asyncio.Lock()  # to read
        self._beside = False  # somebody reads, or is about to
        self.position = source.position

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        """The next prompt, which is read now where it is not yet. Raises DataError."""
        prompt, self.position = self._ready.popleft() if self._ready else self._read()
        if isinstance(prompt, Exception):
            raise prompt
        return prompt

    def continued(self, position: dict[str, Any], outstanding: Sequence[str]) -> Iterator[Prompt]:
        """As the source's."""
        self._rows = self._source.continued(position, outstanding)
        self.position = self._source.position
        return self

    async def read(self, count: int) -> None:
        """Wait until the next `count` prompts are read, or the first of them that cannot be. Raises
        DataError where one takes too long."""
        async with self._turn:
            while not self._is_read(count):
                self._ready += await self._part(count - len(self._ready))

    async def next_few(self, count: int) -> list[Prompt]:
        """Look at the next `count` prompts, which are not handed out by that; fewer where one of
        them cannot be read. Raises DataError where one takes too long."""
        await self.read(count)
        return [prompt for prompt, _ in islice(self._ready, count) if isinstance(prompt, Prompt)]

    def begin(self, tasks: asyncio.TaskGroup, needed: int, then: Callable[[], None]) -> bool:
        """Have the first of so many that are `needed` be read beside everything else. Returns
        whether the next one can be had; where it cannot yet, `then` is called when it can."""
        count = min(needed, self._most)
        if not (self._beside or self._is_read(count)):
            self._beside = True
            tasks.create_task(self._read_beside(count, then), name="read ahead")
        return bool(self._ready) or not self._beside

    def close(self) -> None:
        """Read no more."""
        self._thread.shutdown()

    def _is_read(self, count: int) -> bool:
        return len(self._ready) >= count or bool(self._ready and _failed(self._ready[-1]))

    async def _read_beside(self, count: int, then: Callable[[], None]) -> None:
        await self.read(count)
        self._beside = False
        then()

    async def _part(self, count: int) -> list[Read]:
        """At most `count`, read by a thread. It has ended, too, where the caller is cancelled, for
        somebody may go on with the source; one that hangs is left behind."""
        loop, what = asyncio.get_running_loop(), "data.path: the next row"
        reading = retrieved(loop.run_in_executor(self._thread, self._read_some, count))
        try:
            return await bounded(asyncio.shield(reading), self._row_s, what)
        except TimedOut as e:  # a new start would ask the same source
            raise DataError(f"{e}") from e
        finally:
            await asyncio.wait([reading], timeout=LEAVE_S)

    def _read_some(self, count: int) -> list[Read]:
        """At most `count`, for PART_S at most, so that nobody who is cancelled waits for long."""
        some, until = [self._read()], time.monotonic() + PART_S
        while len(some) < count and not _failed(some[-1]) and time.monotonic() < until:
            some.append(self._read())
        return some

    def _read(self) -> Read:
        try:
            prompt: Prompt | Failure = next(self._rows)
        except (AsyncOpdError, StopIteration) as e:
            prompt = e
        return prompt, self._source.position


def _failed(read: Read) -> bool:
    return isinstance(read[0], Exception)
