"""From prompts to scored groups in the queue."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from itertools import count

import msgspec

from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, OverAge
from async_opd.core.ports import Generator, Ready, Ref, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Prompt, Verdict
from async_opd.driver.ledger import Ledger
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.replica_pool import Pool
from async_opd.driver.teacher_sampling import Taught
from async_opd.driver.timed import GROUP

MAX_LOSSES = 5  # members that a group may cost in a row: it may be what kills them
SCORE_TRIES = 4  # of one group: the first, and three more elsewhere


class Producer:
    """Keeps every slot in use: hands prompts to generators, then has each group scored and verified
    side by side."""

    def __init__(
        self,
        *,
        prompts: Iterator[Prompt],
        needed: int,
        samples: int,
        generators: Pool[Generator],
        teachers: Mapping[str, Pool[Teacher]],
        references: Pool[Teacher] | None,
        verifier: Pool[Verifier],
        slots: Slots,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        max_attempts: int,
        drop_truncated: bool,
        count_tokens: Callable[[str, int], None],
        ledger: Ledger,
        taught: Taught | None = None,
    ):
        """Each prompt has `samples` responses. A group is scored by a replica of its prompt's
        teacher and, where there are `references`, by one of them. `taught`: phased teacher
        sampling.

        `needed` groups are admitted in all, so that the last step leaves none behind; a finally
        dropped one is replaced. `count_tokens(role, tokens)` is told of finished work."""
        self._prompts = prompts
        self._slots = slots
        self._queue = queue
        self._tasks = tasks
        self.needed = needed  # groups still to be admitted
        self._samples = samples
        self._generators = generators
        self._teachers = teachers
        self._references, self._verifier = references, verifier
        self._unscored = 0  # groups in a row that no replica could score
        self._max_attempts = max_attempts
        self._drop_truncated = drop_truncated
        self._count_tokens = count_tokens
        self._ledger, self._taught = ledger, taught

    def fill(self) -> None:
        """Hand out prompts while slots are free."""
        while self.needed and self._slots.free:
            prompt = next(self._prompts)
            self._ledger.handed_out(prompt.id)
            self.needed -= 1
            if self._taught and self._taught.turn():
                prompt = msgspec.structs.replace(prompt, taught=True)
            self._start(self._slots.take(), prompt)

    def dropped(self, ticket: int, prompt: Prompt, cause: str) -> None:
        """A group that will not be trained: issue its prompt again at the front, or drop it for
        good and give its slot to the next prompt. The teacher is asked once; then it is the
        student's turn."""
        if prompt.taught or prompt.attempt + 1 < self._max_attempts:
            again = msgspec.structs.replace(
                prompt, taught=False, attempt=prompt.attempt + (not prompt.taught)
            )
            self._ledger.reissued(prompt.id, again.attempt, cause)
            self._start(ticket, again)
        else:
            self._ledger.dropped(prompt.id, cause)
            self._slots.give_back(ticket)
            self.needed += 1
        self.fill()

    def _start(self, ticket: int, prompt: Prompt) -> None:
        produce = self._teach if prompt.taught else self._produce
        self._tasks.create_task(produce(ticket, prompt), name=f"produce {prompt.id}")

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the generator, then for scorers and verifier together; `queue.put` unblocks the
        learner."""
        GROUP.set(prompt.id)
        try:
            meta, group = await self._generated(prompt)
            tokens = sum(meta.lengths)
            self._count_tokens("generators", tokens)
            scores, reference, verdicts = await asyncio.gather(
                self._scored(self._teachers[prompt.teacher], group, meta),
                self._scored(self._references, group, meta),
                self._checked(prompt, group),
            )
        except (OverAge, CallFailed) as e:
            self._queue.drop(
                ticket, prompt, self._samples, "stale" if isinstance(e, OverAge) else "failed"
            )
            return
        self._count_tokens("teachers", tokens)
        samples = tuple(
            i for i, cut in enumerate(meta.truncated) if not (cut and self._drop_truncated)
        )
        if samples:
            self._queue.put(
                Ready(ticket, prompt, meta, group, scores, verdicts, samples, reference)
            )
        else:
            self._queue.drop(ticket, prompt, self._samples, "truncated")

    async def _teach(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the teacher's own generator, then for the verifier alone."""
        GROUP.set(prompt.id)
        since = self._taught.version()
        try:
            meta, group = await self._taught.answer(
                prompt, losses(prompt.id, self._ledger.returned)
            )
            verdicts = await self._checked(prompt, group)
        except CallFailed:
            self._queue.drop(ticket, prompt, 1, "failed")
            return
        ready = Ready(ticket, prompt, meta, group, None, verdicts, (0,), since=since)
        if cause := self._taught.refuses(ready):
            self._queue.drop(ticket, prompt, 1, cause)
        else:
            self._queue.put(ready)

    async def _generated(self, prompt: Prompt) -> tuple[GroupMeta, Ref]:
        """The group of `prompt`, from another generator where one is lost with it."""
        lost = losses(prompt.id, self._ledger.returned)
        return await self._generators.ask(lambda generator: generator.generate(prompt), lost=lost)

    async def _checked(self, prompt: Prompt, group: Ref) -> tuple[Verdict, ...]:
        return await self._verifier.ask(
            lambda verifier: verifier.check(group), lost=losses(prompt.id)
        )

    async def _scored(self, pool: Pool[Teacher] | None, group: Ref, meta: GroupMeta) -> Ref | None:
        """Scores of `group`. What one replica cannot score, or not in time, another is asked for.
        Raises CallFailed when none can; or the error itself once there are more such groups in a
        row than slots."""
        if pool is None:
            return None
        failed: set[int] = set()
        lost = losses(meta.id)
        for _ in range(SCORE_TRIES):
            try:
                scores = await pool.ask(
                    lambda teacher: teacher.score(group), load=meta.tokens, failed=failed, lost=lost
                )
                self._unscored = 0
                return scores
            except ActorLost:  # nobody is left
                raise
            except AsyncOpdError as e:
                error = e
        self._unscored += 1
        if self._unscored > self._slots.count:
            raise error
        raise CallFailed(
            f"{meta.id}: {SCORE_TRIES} tries to score it failed, the last: {error}"
        ) from error


def losses(
    id: str, note: Callable[[str, str], None] = lambda id, why: None
) -> Callable[[str], None]:
    """What is told of each member that is lost with group `id`, and tells `note`. Raises CallFailed
    at the last."""
    number = count(1)

    def lost(why: str) -> None:
        note(id, why)
        if (so_far := next(number)) == MAX_LOSSES:
            raise CallFailed(f"{id}: {so_far} were lost with it, the last: {why}")

    return lost
