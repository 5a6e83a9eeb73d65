"""From prompts to scored groups in the queue."""

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from async_opd.ports import Generator, Ready, Ref, Teacher, Verifier
from async_opd.stream.queue import Slots, TrajectoryQueue
from async_opd.stream.taught import Taught
from async_opd.wire import Prompt


class Loads:
    """Groups in flight of each generator, kept in order: a choice among hundreds must not look at each of them."""

    def __init__(self, generators: int):
        self._of = [0] * generators
        self._order = [(0, at) for at in range(generators)]

    def least(self) -> int:
        """The generator with the fewest groups, the first of several."""
        return self._order[0][1]

    def add(self, at: int, groups: int) -> None:
        """`groups` more, or fewer, are in flight at generator `at`."""
        del self._order[bisect_left(self._order, (self._of[at], at))]
        self._of[at] += groups
        insort(self._order, (self._of[at], at))


class Pool:
    """The replicas of one scorer. A group goes to the one with the fewest tokens in flight: one group may be many times
    another."""

    def __init__(self, replicas: Sequence[Teacher]):
        self._replicas = replicas
        self._tokens = [0] * len(replicas)  # in flight

    async def score(self, group: Ref, tokens: int) -> Ref:
        """Scores of `group`, which has `tokens` to score."""
        at = self._tokens.index(min(self._tokens))
        self._tokens[at] += tokens
        try:
            return await self._replicas[at].score(group)
        finally:
            self._tokens[at] -= tokens


class Producer:
    """Keeps every slot in use: hands prompts to generators, then has each group scored and verified side by side."""

    def __init__(
        self,
        *,
        prompts: Iterator[Prompt],
        needed: int,
        generators: Sequence[Generator],
        teachers: Mapping[str, Sequence[Teacher]],
        references: Sequence[Teacher],
        verifier: Verifier,
        slots: Slots,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        max_attempts: int,
        drop_truncated: bool,
        count_tokens: Callable[[str, int], None],
        taught: Taught | None = None,
    ):
        """A group is scored by a replica of its prompt's teacher and, where there are `references`, by one of them.
        `taught`: phased teacher sampling.

        `needed` groups are admitted in all, so that the last step leaves none behind; a finally dropped one is
        replaced. `count_tokens(role, tokens)` is told of finished work."""
        self._prompts, self._slots, self._queue, self._tasks = prompts, slots, queue, tasks
        self.needed = needed  # groups still to be admitted
        self._generators, self._verifier = generators, verifier
        self._teachers = {name: Pool(replicas) for name, replicas in teachers.items()}
        self._reference = Pool(references) if references else None
        self._max_attempts, self._drop_truncated, self._count_tokens = max_attempts, drop_truncated, count_tokens
        self._taught = taught
        self._again: deque[tuple[int, Prompt]] = deque()
        self._loads = Loads(len(generators))

    def fill(self) -> None:
        """Hand out prompts while slots are free, re-issued ones first."""
        while self._again:
            self._start(*self._again.popleft())
        while self.needed and self._slots.free:
            prompt = next(self._prompts)
            self.needed -= 1
            if self._taught and self._taught.turn():
                prompt = msgspec.structs.replace(prompt, taught=True)
            self._start(self._slots.take(), prompt)

    def dropped(self, ready: Ready, cause: str) -> None:
        """A group that will not be trained: issue its prompt again at the front, or drop it for good and give its
        slot to the next prompt. The teacher is asked once; then it is the student's turn."""
        if ready.prompt.taught:
            self._again.append((ready.ticket, msgspec.structs.replace(ready.prompt, taught=False)))
        elif ready.prompt.attempt + 1 < self._max_attempts:
            again = msgspec.structs.replace(ready.prompt, attempt=ready.prompt.attempt + 1)
            self._again.append((ready.ticket, again))
        else:
            self._slots.give_back(ready.ticket)
            self.needed += 1
        self.fill()

    def _start(self, ticket: int, prompt: Prompt) -> None:
        produce = self._teach if prompt.taught else self._produce
        self._tasks.create_task(produce(ticket, prompt), name=f"produce {prompt.id}")

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the generator, then for scorers and verifier together; `queue.put` unblocks the learner."""
        at = self._loads.least()
        self._loads.add(at, 1)
        try:
            meta, group = await self._generators[at].generate(prompt)
        finally:
            self._loads.add(at, -1)
        tokens = sum(meta.lengths)
        self._count_tokens("generators", tokens)
        scores, reference, verdicts = await asyncio.gather(
            self._teachers[prompt.teacher].score(group, meta.tokens),
            self._refer(group, meta.tokens),
            self._verifier.check(group),
        )
        self._count_tokens("teachers", tokens)
        samples = tuple(i for i, cut in enumerate(meta.truncated) if not (cut and self._drop_truncated))
        ready = Ready(ticket, prompt, meta, group, scores, verdicts, samples, reference)
        if samples:
            self._queue.put(ready)
        else:
            self._queue.drop(ready, "truncated")

    async def _teach(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the teacher's own generator, then for the verifier alone."""
        since = self._taught.version()
        meta, group = await self._taught.answer(prompt)
        ready = Ready(ticket, prompt, meta, group, None, await self._verifier.check(group), (0,), since=since)
        if cause := self._taught.refuses(ready):
            self._queue.drop(ready, cause)
        else:
            self._queue.put(ready)

    async def _refer(self, group: Ref, tokens: int) -> Ref | None:
        return self._reference and await self._reference.score(group, tokens)
