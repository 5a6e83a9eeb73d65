"""Greedy accuracy on held-out problems, of the published weights and of the teacher."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from async_opd.ports import Generator, Teacher, Verifier
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


async def of_generators(generators: Sequence[Generator], verifier: Verifier, held_out: list[Prompt]) -> Accuracy:
    """Accuracy of the weights the generators hold, one greedy response a problem."""

    async def one(at: int, prompt: Prompt) -> Verdict:
        _, group = await generators[at % len(generators)].greedy(prompt)
        (verdict,) = await verifier.check(group)
        return verdict

    return Accuracy.of(await asyncio.gather(*(one(at, prompt) for at, prompt in enumerate(held_out))))


async def of_teacher(teacher: Teacher, verifier: Verifier, held_out: list[Prompt]) -> Accuracy:
    """The teacher's own accuracy, by its own greedy responses."""
    responses = await teacher.greedy([p.ids if p.teacher_ids is None else p.teacher_ids for p in held_out])
    checks = (verifier.check_response(p.id, ids, p.answer) for p, ids in zip(held_out, responses, strict=True))
    return Accuracy.of(await asyncio.gather(*checks))
