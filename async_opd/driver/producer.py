"""From a prompt to a scored group in the queue."""

import asyncio
from collections.abc import Callable, Iterable
from itertools import count
from typing import NamedTuple

from async_opd.core.errors import CallFailed, OverAge, WireError
from async_opd.core.ports import Generator, Ref, ScoredGroup, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Prompt, Verdict
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import GroupFailed, Outcomes, blamed
from async_opd.driver.pools import Pools
from async_opd.driver.queue import TrajectoryQueue
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.roles.rollout.config import RolloutConfig

MAX_LOSSES = 5  # members that a group may cost in a row: it may be what kills them
SCORE_TRIES = 4  # of one group: the first, and three more elsewhere


class Scored(NamedTuple):
    """What a pool of scorers says of a group."""

    scores: Ref | None  # they stay where they are
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
                    Generator.generate, prompt, of=id, lost=losses(id, self._ledger.returned)
                )
            tokens = sum(meta.lengths)
            self._count_tokens("generators", tokens)
            scored, referred, verdicts = await asyncio.gather(
                self._scored(pools.teachers[prompt.teacher], group, meta),
                self._referred(group, meta),
                self._verified(group, meta),
            )
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
            return await verifier.ask(Verifier.check, group, of=meta.id, lost=losses(meta.id))

    async def _referred(self, group: Ref, meta: GroupMeta) -> Scored:
        """Scores of the reference, where there is one."""
        references = self._pools.references
        return await self._scored(references, group, meta) if references else Scored(None, {})

    async def _scored(self, pool: ReplicaPool[Teacher], group: Ref, meta: GroupMeta) -> Scored:
        """Scores of `group`. What one replica cannot score, or not in time, another is asked for;
        what two cannot score of it fails alone. Raises GroupFailed when none scores any."""
        asked: set[int] = set()
        answers: list[Scored] = []
        lost, error = losses(meta.id), None
        for _ in range(SCORE_TRIES):
            try:
                with blamed(pool.name):
                    causes, scores = await pool.ask(
                        Teacher.score, group, of=meta.id, load=meta.tokens, asked=asked, lost=lost
                    )
                    if len(causes) != len(meta.spans):
                        raise WireError(f"{meta.id}: {len(causes)} of {len(meta.spans)} scored")
            except GroupFailed as e:
                error = e
                continue
            failures = _failures(pool.name, causes)
            answers.append(Scored(scores, failures))
            others = any(each.index not in asked for each in pool.serving)
            if not failures or len(answers) == 2 or not others:
                return min(answers, key=lambda scored: len(scored.failures))
        if answers:
            return answers[0]
        why = f"{meta.id}: {SCORE_TRIES} tries to score it failed, the last: {error and error.why}"
        raise GroupFailed(pool.name, why) from error


def _failures(role: str, causes: Iterable[str]) -> dict[int, GroupFailed]:
    """What failed by the doing of `role`, by the number of the rollout."""
    return {sample: GroupFailed(role, why) for sample, why in enumerate(causes) if why}


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
