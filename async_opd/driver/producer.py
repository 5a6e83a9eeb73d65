"""From a prompt to a scored group in the queue."""

import asyncio
from collections.abc import Callable
from itertools import count

from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, OverAge
from async_opd.core.ports import Generator, Ref, ScoredGroup, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Prompt
from async_opd.driver.ledger import Ledger
from async_opd.driver.pools import Pools
from async_opd.driver.queue import TrajectoryQueue
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.roles.rollout.config import RolloutConfig

MAX_LOSSES = 5  # members that a group may cost in a row: it may be what kills them
SCORE_TRIES = 4  # of one group: the first, and three more elsewhere


class Producer:
    """Has the student respond to prompts, and each group scored and verified side by side."""

    def __init__(
        self,
        pools: Pools,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        *,
        rollout: RolloutConfig,
        max_unscored: int,
        ledger: Ledger,
        count_tokens: Callable[[str, int], None],
    ):
        """More than `max_unscored` groups in a row that no replica can score end the run.
        `count_tokens(role, tokens)` is told of finished work."""
        self._pools = pools
        self._queue = queue
        self._tasks = tasks
        self._rollout = rollout
        self._max_unscored = max_unscored
        self._unscored = 0  # groups in a row that no replica could score
        self._ledger = ledger
        self._count_tokens = count_tokens

    def start(self, ticket: int, prompt: Prompt) -> None:
        """Make a group of `prompt`, which holds the slot of `ticket`, beside everything else."""
        self._tasks.create_task(self._produce(ticket, prompt), name=f"produce {prompt.id}")

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the generator, then for scorers and verifier together; `queue.put` unblocks the
        learner."""
        id, pools = prompt.id, self._pools
        try:
            meta, group = await pools.generators.ask(
                Generator.generate, prompt, of=id, lost=losses(id, self._ledger.returned)
            )
            tokens = sum(meta.lengths)
            self._count_tokens("generators", tokens)
            scores, reference, verdicts = await asyncio.gather(
                self._scored(pools.teachers[prompt.teacher], group, meta),
                self._referred(group, meta),
                pools.verifier.ask(Verifier.check, group, of=id, lost=losses(id)),
            )
        except OverAge:
            self._drop(ticket, prompt, "stale")
            return
        except CallFailed:
            self._drop(ticket, prompt, "failed")
            return
        self._count_tokens("teachers", tokens)
        drop_truncated = self._rollout.truncated == "drop"
        samples = [s for s, cut in enumerate(meta.truncated) if not (cut and drop_truncated)]
        if not samples:
            self._drop(ticket, prompt, "truncated")
            return
        self._queue.put(
            ScoredGroup(
                ticket=ticket,
                prompt=prompt,
                meta=meta,
                group=group,
                scores=scores,
                verdicts=verdicts,
                samples=tuple(samples),
                since=meta.oldest,
                reference=reference,
            )
        )

    def _drop(self, ticket: int, prompt: Prompt, cause: str) -> None:
        self._queue.drop(ticket, prompt, self._rollout.samples_per_prompt, cause)

    async def _referred(self, group: Ref, meta: GroupMeta) -> Ref | None:
        """Scores of the reference, where there is one."""
        references = self._pools.references
        return await self._scored(references, group, meta) if references else None

    async def _scored(self, pool: ReplicaPool[Teacher], group: Ref, meta: GroupMeta) -> Ref:
        """Scores of `group`. What one replica cannot score, or not in time, another is asked for.
        Raises CallFailed when none can; or the error itself once there are more such groups in a
        row than slots."""
        failed: set[int] = set()
        lost, error = losses(meta.id), None
        for _ in range(SCORE_TRIES):
            try:
                scores = await pool.ask(
                    Teacher.score, group, of=meta.id, load=meta.tokens, failed=failed, lost=lost
                )
                self._unscored = 0
                return scores
            except ActorLost:  # nobody is left
                raise
            except AsyncOpdError as e:
                error = e
        self._unscored += 1
        if error and self._unscored > self._max_unscored:
            raise error
        raise CallFailed(
            f"{meta.id}: {SCORE_TRIES} tries to score it failed, the last: {error}"
        ) from error


def losses(
    id: str, note: Callable[[str, str], None] = lambda id, why: None
) -> Callable[[str], None]:
    """Make what is told of each member that is lost with group `id`, and tells `note`. It raises
    CallFailed at the last."""
    number = count(1)

    def lost(why: str) -> None:
        note(id, why)
        if (so_far := next(number)) == MAX_LOSSES:
            raise CallFailed(f"{id}: {so_far} were lost with it, the last: {why}")

    return lost
