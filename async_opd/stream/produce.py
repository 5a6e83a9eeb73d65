"""From prompts to scored groups in the queue."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from async_opd.ports import Generator, Ready, Teacher, Verifier
from async_opd.stream.queue import Slots, TrajectoryQueue
from async_opd.wire import Prompt


class Producer:
    """Keeps every slot in use: hands prompts to generators, then has each group scored and verified side by side."""

    def __init__(
        self,
        *,
        prompts: Iterator[Prompt],
        needed: int,
        generators: Sequence[Generator],
        teachers: Sequence[Teacher],
        verifier: Verifier,
        slots: Slots,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        max_attempts: int,
        drop_truncated: bool,
        count_tokens: Callable[[str, int], None],
    ):
        """`needed` groups are admitted in all, so that the last step leaves none behind; a finally dropped one is
        replaced. `count_tokens(role, tokens)` is told of finished work."""
        self._prompts, self._needed, self._slots, self._queue, self._tasks = prompts, needed, slots, queue, tasks
        self._generators, self._teachers, self._verifier = generators, teachers, verifier
        self._max_attempts, self._drop_truncated, self._count_tokens = max_attempts, drop_truncated, count_tokens
        self._again: deque[tuple[int, Prompt]] = deque()
        self._load: Counter[int] = Counter()  # groups in flight per generator
        self._scoring: Counter[int] = Counter()  # tokens in flight per teacher: one group may be many times another

    def fill(self) -> None:
        """Hand out prompts while slots are free, re-issued ones first."""
        while self._again:
            self._start(*self._again.popleft())
        while self._needed and self._slots.free:
            prompt = next(self._prompts)
            self._needed -= 1
            self._start(self._slots.take(), prompt)

    def dropped(self, ready: Ready, cause: str) -> None:
        """A group that will not be trained: issue its prompt again at the front, or drop it for good and give its
        slot to the next prompt."""
        if ready.prompt.attempt + 1 < self._max_attempts:
            again = msgspec.structs.replace(ready.prompt, attempt=ready.prompt.attempt + 1)
            self._again.append((ready.ticket, again))
        else:
            self._slots.give_back(ready.ticket)
            self._needed += 1
        self.fill()

    def _start(self, ticket: int, prompt: Prompt) -> None:
        self._tasks.create_task(self._produce(ticket, prompt), name=f"produce {prompt.id}")

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the generator, then for teacher and verifier together; `queue.put` unblocks the learner."""
        at = min(range(len(self._generators)), key=lambda i: (self._load[i], i))
        self._load[at] += 1
        try:
            meta, group = await self._generators[at].generate(prompt)
        finally:
            self._load[at] -= 1
        tokens = sum(meta.lengths)
        self._count_tokens("generators", tokens)
        scores, verdicts = await asyncio.gather(self._score(group, meta.tokens), self._verifier.check(group))
        self._count_tokens("teachers", tokens)
        samples = tuple(i for i, cut in enumerate(meta.truncated) if not (cut and self._drop_truncated))
        ready = Ready(ticket, prompt, meta, group, scores, verdicts, samples)
        if samples:
            self._queue.put(ready)
        else:
            self._queue.drop(ready, "truncated")

    async def _score(self, group: object, tokens: int) -> object:
        at = min(range(len(self._teachers)), key=lambda i: (self._scoring[i], i))
        self._scoring[at] += tokens
        try:
            return await self._teachers[at].score(group)
        finally:
            self._scoring[at] -= tokens
