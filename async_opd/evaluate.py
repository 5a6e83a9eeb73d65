"""Greedy accuracy on held-out problems, of the published weights and of the teacher."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from async_opd.ports import Generator, Teacher, Verifier
from async_opd.stream.pool import Pool
from async_opd.wire import Prompt, Verdict


@dataclass(frozen=True)
class Accuracy:
    """Verdicts on `problems` held-out problems."""

    right: int
    unknown: int  # timed out or crashed: neither right nor wrong
    problems: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Accuracy":
        found = [verdict.correct for verdict in verdicts]
        return cls(found.count(True), found.count(None), len(found))

    @property
    def share(self) -> float:
        """Right ones among the decided."""
        return self.right / max(self.problems - self.unknown, 1)


async def of_generators(generators: Pool[Generator], verifier: Pool[Verifier], held_out: list[Prompt]) -> Accuracy:
    """Accuracy of the weights the generators hold, one greedy response a problem."""

    async def one(prompt: Prompt) -> Verdict:
        _, group = await generators.ask(lambda generator: generator.greedy(prompt))
        (verdict,) = await verifier.ask(lambda verifier: verifier.check(group))
        return verdict

    return Accuracy.of(await asyncio.gather(*map(one, held_out)))


async def of_teacher(teachers: Pool[Teacher], verifier: Pool[Verifier], held_out: list[Prompt]) -> Accuracy:
    """The teacher's own accuracy, by its own greedy responses."""
    prompts = [p.ids if p.teacher_ids is None else p.teacher_ids for p in held_out]
    responses = await teachers.ask(lambda teacher: teacher.greedy(prompts))

    async def one(prompt: Prompt, ids: np.ndarray) -> Verdict:
        return await verifier.ask(lambda verifier: verifier.check_response(prompt.id, ids, prompt.answer))

    return Accuracy.of(await asyncio.gather(*map(one, held_out, responses)))
