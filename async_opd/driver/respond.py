"""Held-out problems through the pools: responses of the weights that the generators hold, or of a
teacher."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from async_opd.core.aio import first_cause
from async_opd.core.ports import Generator, Ref, Teacher, Verifier
from async_opd.core.wire import GroupMeta, Ints, Prompt, Sampling, Verdict
from async_opd.driver.producer import losses
from async_opd.driver.replica_pool import ReplicaPool

T = TypeVar("T")
GREEDY = Sampling()
ALL = 2.0  # of the engines' places may be asked for with nothing beside: enough to keep them full


@dataclass(frozen=True)
class Accuracy:
    """Verdicts on `problems` held-out problems, one response each."""

    right: int
    unknown: int  # of the others: timed out or crashed
    problems: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Accuracy":
        correct = [verdict.correct for verdict in verdicts]
        return cls(correct.count(True), correct.count(None), len(correct))

    @property
    def share(self) -> float:
        """Right ones among all; none whose verdict is unknown is one."""
        return self.right / max(self.problems, 1)

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
    meanwhile."""
    # a prompt of training may have the same id: ids are rows of their own data
    of = f"evaluation/{prompt.id}"
    meta, group = await generators.ask(
        Generator.respond, prompt, sampling, of=of, lost=losses(prompt.id)
    )
    verdicts = await verifier.ask(Verifier.check, group, of=of, lost=losses(prompt.id))
    return Responded(meta, group, verdicts)


async def of_all(
    problems: Sequence[Prompt], one: Callable[[Prompt], Awaitable[T]], at_once: int
) -> list[T]:
    """What `one` gives for each of `problems`, `at_once` of them at a time, so that none waits in
    an engine for long. The first error ends the others."""
    places = asyncio.Semaphore(at_once)

    async def placed(prompt: Prompt) -> T:
        async with places:
            return await one(prompt)

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
            Verifier.check_response, prompt.id, ids, prompt.answer, of=prompt.id
        )

    return Accuracy.of(await asyncio.gather(*map(one, held_out, responses)))
