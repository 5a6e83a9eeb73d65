"""Prompts rendered and tokenized beside the event loop, before they are wanted."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from async_opd.core.aio import bounded, retrieved
from async_opd.core.aside import DaemonThread
from async_opd.core.errors import AsyncOpdError, DataError, TimedOut
from async_opd.core.wire import Prompt
from async_opd.driver.filter import Filter
from async_opd.driver.resume import Source

PART_S = 0.1
LEAVE_S = 5.0  # in which a row is read that somebody waited for who was cancelled
Failure = AsyncOpdError | StopIteration
Dropped = list[tuple[str, str]]  # ids with their causes


class Read(NamedTuple):
    """A prompt, or why there is none."""

    prompt: Prompt | Failure
    position: dict[str, Any]  # the source's, behind it


class ReadAhead:
    """A `Source` over another, of which a thread reads what comes next. What is read and not handed
    out does not count: `position` is behind the last prompt that was, and a row's error is raised
    where its prompt would have been handed out.

    What a `filter` drops is passed over. Whether it does is decided when a prompt's turn has come,
    by what was trained until then, and not when it is read; the books say so once it is passed.
    """

    def __init__(self, source: Source, most: int, row_s: float, filter: Filter | None = None):
        """`most` are read beside everything else. A row takes at most `row_s`."""
        self._source, self._most = source, most
        self._row_s = row_s
        self._filter = filter
        self._thread = DaemonThread("read ahead")
        self._rows = iter(source)
        self._read_on: deque[Read] = deque()
        # whose turn has come, with what is dropped before each
        self._ready: deque[tuple[Read, Dropped]] = deque()
        self._passed: Dropped = []  # behind the last of them
        self._passing = 0  # whole epochs that had been read where that began
        self._kept: set[str] = set()  # ids that were handed out before a resume
        self._turn = asyncio.Lock()  # to read
        self._beside = False  # somebody reads, or is about to
        self.position = source.position

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        """The next prompt, which is read now where it is not yet. Raises DataError."""
        while not self._take(1):
            self._read_on.append(self._read())
        (prompt, self.position), dropped = self._ready.popleft()
        for id, cause in dropped:
            assert self._filter
            self._filter.dropped(id, cause)
        if isinstance(prompt, Exception):
            raise prompt
        return prompt

    def continued(self, position: dict[str, Any], outstanding: Sequence[str]) -> Iterator[Prompt]:
        """As the source's. What is outstanding is not dropped: it was handed out."""
        self._kept = set(outstanding)
        self._rows = self._source.continued(position, outstanding)
        self.position = self._source.position
        return self

    async def read(self, count: int) -> None:
        """Wait until the next `count` prompts, whose turn has come, are read, or the first of them
        that cannot be. Raises DataError where one takes too long."""
        async with self._turn:
            while not self._take(count):
                wanted = count - len(self._ready)
                # many at a time, where most are passed over
                self._read_on += await self._part(max(wanted, self._most * bool(self._passed)))

    async def next_few(self, count: int) -> list[Prompt]:
        """Look at the next `count` prompts, which are not handed out by that; fewer where one of
        them cannot be read. Raises DataError where one takes too long."""
        await self._read_raw(count)
        coming = islice(chain((read for read, _ in self._ready), self._read_on), count)
        return [prompt for prompt, _ in coming if isinstance(prompt, Prompt)]

    def begin(
        self, tasks: asyncio.TaskGroup, needed: int, free: int, then: Callable[[], None]
    ) -> bool:
        """Have the first of so many that are `needed` be read beside everything else, where `free`
        of them have their turn. Returns whether the next one can be had; where it cannot yet,
        `then` is called when it can."""
        count = min(needed, self._most)
        self._take(min(needed, free, 1))
        if not (self._beside or self._is_read(count)):
            self._beside = True
            tasks.create_task(self._read_beside(count, then), name="read ahead")
        return bool(self._ready) or not self._beside

    def close(self) -> None:
        """Read no more."""
        self._thread.shutdown()

    def _take(self, count: int) -> bool:
        """Decide of what is read until `count` prompts are to be handed out; tells whether they
        are, or the first of them that cannot be."""
        while len(self._ready) < count and self._read_on and not self._has_failed:
            read = self._read_on.popleft()
            cause = self._cause(read.prompt) if self._filter else ""
            if cause and isinstance(read.prompt, Prompt):
                read = self._pass(read, read.prompt.id, cause)
            if read:
                self._ready.append((read, self._passed))
                self._passed = []
        return len(self._ready) >= count or self._has_failed

    @property
    def _has_failed(self) -> bool:
        return bool(self._ready) and _failed(self._ready[-1][0])

    def _cause(self, prompt: Prompt | Failure) -> str:
        """Why the filter drops `prompt`; empty where it does not."""
        assert self._filter
        if isinstance(prompt, Exception) or prompt.id in self._kept:
            return ""
        return self._filter.cause(prompt)

    def _pass(self, read: Read, id: str, cause: str) -> Read | None:
        """Pass over a prompt; the end of all, where nothing else came of a whole epoch."""
        assert self._filter
        epoch = read.position["epoch"]
        if not self._passed:
            self._passing = epoch
        self._passed.append((id, cause))
        if epoch < self._passing + 2:
            return None
        self._rows = iter(())
        return Read(DataError(self._filter.none_left), read.position)

    def _is_read(self, count: int) -> bool:
        failed = _failed(self._read_on[-1]) if self._read_on else self._has_failed
        return failed or len(self._ready) + len(self._read_on) >= count

    async def _read_raw(self, count: int) -> None:
        """Wait until `count` more are read, whatever is decided of them."""
        async with self._turn:
            while not self._is_read(count):
                self._read_on += await self._part(count - len(self._ready) - len(self._read_on))

    async def _read_beside(self, count: int, then: Callable[[], None]) -> None:
        await self._read_raw(count)
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
        return Read(prompt, self._source.position)


def _failed(read: Read) -> bool:
    return isinstance(read.prompt, Exception)
