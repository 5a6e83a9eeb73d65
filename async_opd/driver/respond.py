"""Held-out problems through the pools: responses of the weights that the generators hold, or of a
teacher."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from async_opd.core.aio import first_cause
from async_opd.core.errors import CallFailed
from async_opd.core.ports import Generator, Ref, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Ints, Prompt, Sampling, Verdict
from async_opd.driver.producer import unsound
from async_opd.driver.replica_pool import ReplicaPool

T = TypeVar("T")
GREEDY = Sampling()
ALL = 2.0  # of the engines' places may be asked for with nothing beside: enough to keep them full


@dataclass(frozen=True)
class Accuracy:
    """Verdicts on `problems` held-out problems, one response each."""

    rewards: float  # their sum: the number of right ones, where the check gives no shares
    unknown: int  # of the others: timed out or crashed
    problems: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Accuracy":
        rewards = [verdict.reward for verdict in verdicts]
        return cls(sum(reward or 0.0 for reward in rewards), rewards.count(None), len(rewards))

    @property
    def share(self) -> float:
        """Mean reward of all, the share of right ones; 0 of one whose verdict is unknown."""
        return self.rewards / max(self.problems, 1)

    @property
    def known(self) -> float:
        """Share of the problems whose verdict is known."""
        return 1 - self.unknown / max(self.problems, 1)


@dataclass(frozen=True)
class Responded:
    """The responses to one problem; the data stays where it was made."""

    meta: GroupMeta
    group: Ref
    verdicts: tuple[Verdict, ...]


async def respond(
    generators: ReplicaPool[Generator],
    verifier: ReplicaPool[Verifier],
    prompt: Prompt,
    sampling: Sampling = GREEDY,
) -> Responded:
    """Have `prompt` responded to and the responses checked, by others where somebody is lost
    meanwhile, or refuses. Raises CallFailed where all of them do."""
    # a prompt of training may have the same id: ids are rows of their own data
    of = f"evaluation/{prompt.id}"
    meta, group = await generators.ask(
        Generator.respond, prompt, sampling, of=of, unsound=partial(unsound, prompt.id)
    )
    verdicts = await verifier.ask(Verifier.check, group, of=of)
    return Responded(meta, group, verdicts)


async def of_all(
    problems: Sequence[Prompt],
    one: Callable[[Prompt], Awaitable[T]],
    at_once: int,
    max_failed_share: float,
) -> list[T | CallFailed]:
    """What `one` gives for each of `problems`, `at_once` of them at a time, so that none waits in
    an engine for long. What nobody can give costs itself, and above that share of them all; any
    other error ends the others at once."""
    places = asyncio.Semaphore(at_once)
    failed = 0

    async def placed(prompt: Prompt) -> T | CallFailed:
        nonlocal failed
        async with places:
            try:
                return await one(prompt)
            except CallFailed as e:
                failed += 1
                if failed == len(problems) or failed > max_failed_share * len(problems):
                    raise
                return e

    try:
        async with asyncio.TaskGroup() as tasks:
            placing = [tasks.create_task(placed(prompt)) for prompt in problems]
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    return [task.result() for task in placing]


async def of_teacher(
    teachers: ReplicaPool[Teacher], verifier: ReplicaPool[Verifier], held_out: list[Prompt]
) -> Accuracy:
    """The teacher's own accuracy, by its own greedy responses."""
    prompts = [prompt.shown_to_teacher for prompt in held_out]
    responses = await teachers.ask(Teacher.greedy, *prompts)

    async def one(prompt: Prompt, ids: Ints) -> Verdict:
        return await verifier.ask(
            Verifier.check_response, prompt.id, ids, prompt.answer, of=f"evaluation/{prompt.id}"
        )

    return Accuracy.of(await asyncio.gather(*map(one, held_out, responses)))
