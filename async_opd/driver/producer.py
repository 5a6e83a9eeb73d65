"""From a prompt to a scored group in the queue."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from async_opd.core.aio import ended
from async_opd.core.errors import OverAge, WireError
from async_opd.core.ports import Generator, Ref, ScoredGroup, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Prompt, Verdict
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import GroupFailed, Outcomes, blamed
from async_opd.driver.pools import Pools
from async_opd.driver.queue import TrajectoryQueue
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.roles.rollout.config import RolloutConfig


class Scored(NamedTuple):
    """What a pool of scorers says of a group."""

    scores: Ref | None  # they stay where they are; None: the learner has them, or nobody
    failures: dict[int, GroupFailed]  # by the number of the rollout that has none


class Producer:
    """Has the student respond to prompts, and each group scored and verified side by side."""

    def __init__(
        self,
        pools: Pools,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        *,
        rollout: RolloutConfig,
        outcomes: Outcomes,
        ledger: Ledger,
        count_tokens: Callable[[str, int], None],
    ):
        """`outcomes` hears how each group comes out of this, `count_tokens(role, tokens)` of
        finished work."""
        self._pools = pools
        self._queue = queue
        self._tasks = tasks
        self._rollout = rollout
        self._outcomes = outcomes
        self._ledger = ledger
        self._count_tokens = count_tokens
        self.lethal: set[str] = set()  # prompts that end whom they are asked of

    def start(self, ticket: int, prompt: Prompt) -> None:
        """Make a group of `prompt`, which holds the slot of `ticket`, beside everything else."""
        self._tasks.create_task(self._produce(ticket, prompt), name=f"produce {prompt.id}")

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the generator, then for scorers and verifier together; `queue.put` unblocks the
        learner."""
        id, pools = prompt.id, self._pools
        try:
            with blamed(pools.generators.name):
                meta, group = await pools.generators.ask(
                    Generator.generate,
                    prompt,
                    of=id,
                    unsound=partial(unsound, id),
                    lost=partial(self._ledger.returned, id),
                )
            tokens = sum(meta.lengths)
            self._count_tokens("generators", tokens)
            teachers = pools.teachers.get(prompt.teacher)
            scoring = asyncio.create_task(self._scored(teachers, group, meta))
            referring = asyncio.create_task(self._scored(pools.references, group, meta))
            verifying = asyncio.create_task(self._verified(group, meta))
            async with ended(scoring, referring, verifying):
                scored, referred, verdicts = await asyncio.gather(scoring, referring, verifying)
            if teachers:
                self._count_tokens("teachers", tokens)
            self._outcomes.undecided.hear(verdicts)
            unsampled = _failures(pools.generators.name, meta.failures)
            failures = scored.failures | referred.failures | unsampled
            left = self._left(prompt, failures, len(meta.spans))
        except OverAge:
            self._drop(ticket, prompt, "stale")
            return
        except GroupFailed as e:
            self._outcomes.failed(prompt, e)
            if e.lethal:
                self.lethal.add(id)
            self._drop(ticket, prompt, "failed")
            return
        policy = self._rollout.truncated
        samples = [s for s in left if not (policy == "drop" and meta.truncated[s])]
        if not samples:
            self._drop(ticket, prompt, "truncated")
            return
        cut = policy == "mask" and all(meta.truncated[s] for s in samples)
        self._outcomes.scored(prompt, cut=cut)
        self._queue.put(
            ScoredGroup(
                ticket=ticket,
                prompt=prompt,
                meta=meta,
                group=group,
                scores=scored.scores,
                verdicts=verdicts,
                samples=tuple(samples),
                since=meta.oldest,
                reference=referred.scores,
                by_learner=teachers is None,
            )
        )

    def _left(self, prompt: Prompt, failures: dict[int, GroupFailed], count: int) -> list[int]:
        """Which of `count` rollouts have scores; the others are noted. Raises GroupFailed where
        none has."""
        left = [sample for sample in range(count) if sample not in failures]
        if not left:
            raise failures[0]
        for sample, failure in failures.items():
            self._outcomes.lost(prompt, sample, failure)
        return left

    def _drop(self, ticket: int, prompt: Prompt, cause: str) -> None:
        self._queue.drop(ticket, prompt, self._rollout.samples_per_prompt, cause)

    async def _verified(self, group: Ref, meta: GroupMeta) -> tuple[Verdict, ...]:
        verifier = self._pools.verifier
        with blamed(verifier.name):
            return await verifier.ask(Verifier.check, group, of=meta.id)

    async def _scored(
        self, pool: ReplicaPool[Teacher] | None, group: Ref, meta: GroupMeta
    ) -> Scored:
        """Scores of `group`, less what fails of it alone; nothing where no pool scores it. Raises
        GroupFailed when there are none."""
        if pool is None:
            return Scored(None, {})

        def unscored(answer: tuple[tuple[str, ...], Ref]) -> list[str]:
            causes, _ = answer
            if len(causes) != len(meta.spans):
                raise WireError(f"{meta.id}: {len(causes)} of {len(meta.spans)} scored")
            return [why for why in causes if why]

        with blamed(pool.name):
            causes, scores = await pool.ask(
                Teacher.score, group, of=meta.id, load=meta.tokens, unsound=unscored
            )
        return Scored(scores, _failures(pool.name, causes))


def _failures(role: str, causes: Iterable[str]) -> dict[int, GroupFailed]:
    """What failed by the doing of `role`, by the number of the rollout."""
    return {sample: GroupFailed(role, why) for sample, why in enumerate(causes) if why}


def unsound(id: str, answer: tuple[GroupMeta, Ref]) -> list[str]:
    """Say of a generator's answer to prompt `id` why rollouts of it failed. Raises WireError where
    it answers something else."""
    meta, _ = answer
    samples = len(meta.spans)
    whole = samples and all(meta.spans) and len(meta.truncated) == samples
    if meta.id != id or not whole or len(meta.failures) not in (0, samples):
        raise WireError(f"{id}: what answers it is no group of it: {meta}")
    return [why for why in meta.failures if why]
