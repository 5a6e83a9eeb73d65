"""Replicas of one scorer, a teacher or the reference, held against one another by one probe."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, AsyncOpdError, ScorerDiffers
from async_opd.core.ports import Teacher
from async_opd.core.wire import Floats
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool

# Nats: the largest difference in float32. bfloat16 has eight bits, so that a log-prob moves by a
# tenth with the company that it is computed in; a wrong weight moves all of them.
BOUNDS: dict[str, tuple[Callable[[Floats], Any], float]] = {
    "float32": (np.max, 1e-3),
    "bfloat16": (np.mean, 0.2),
}
Answers = Mapping[Replica[Teacher], Floats]


class ScorerProbe:
    """Asks each replica of one scorer the same, and gives up the one that says something else.

    Right is what most of them say, and for a model that does not change also what was right before.
    Of two that differ the one that does not repeat itself is wrong; where both do, the first stays
    and the other is replaced. The replacement decides: where it differs again, the run ends, and so
    it does where there can be none.

    What takes a server's place is the same server again. Once its like have been right, one that
    differs is no end of the run: it is left out, and looked at again ever more rarely.
    """

    def __init__(self, dtype: str, *, moving: bool, served: bool = False):
        """`moving`: the model changes while the run goes on. `served`: by somebody's servers."""
        self.moving = moving
        self._served = served
        self._worst, self._bound = BOUNDS[dtype]
        self._right: Floats | None = None  # what an unchanged model answers
        self._differed: set[int] = set()  # numbers of replicas that were given up for it
        self._comparing: asyncio.Future[None] | None = None

    async def welcome(self, newcomer: Replica[Teacher]) -> None:
        """Have a new replica answer before it serves. Raises ActorLost where it differs, and
        ScorerDiffers where the one before it did so, too."""
        try:
            answer = await newcomer.call(Teacher.probe)
        except AsyncOpdError as e:
            raise ActorLost(f"{e}") from e
        if self._right is None or self._agree(answer, self._right):
            self._differed.discard(newcomer.index)
            return
        why = f"{newcomer.name}: {self._gap(answer, self._right)} what the others say of the probe"
        if newcomer.index in self._differed:
            raise ScorerDiffers(f"{why}, as the one before it")
        self._note(newcomer)
        raise ActorLost(why)

    async def compare(self, pool: ReplicaPool[Teacher]) -> None:
        """Ask all that serve, and retire those that differ. Raises ScorerDiffers where nobody can
        tell who is right."""
        answers = await self._answers(pool)
        right = self._right if self._right is not None else self._majority(answers)
        if right is None and answers:
            again = await self._answers(pool)
            for each in [r for r in answers if r in again]:
                if not self._agree(answers[each], again[each]):
                    del answers[each]
                    self._retire(pool, each, "it answers the same probe in two ways")
            right = self._majority(answers) if answers else None
        if right is None and answers:
            right = self._undecided(pool, answers)
        if right is None:
            return
        whose = next((r.name for r in answers if self._agree(answers[r], right)), "one before it")
        for each, answer in answers.items():
            if not self._agree(answer, right):
                gap = self._gap(answer, right)
                self._retire(pool, each, f"{gap} what {whose} says of the probe")
        if not self.moving:
            self._right = right

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Where `begin` has its task from now on."""
        self._tasks = tasks

    def begin(self, pool: ReplicaPool[Teacher]) -> None:
        """Compare beside everything else, unless the last time is not over yet."""
        if self._comparing is None or self._comparing.done():
            self._comparing = retrieved(self._tasks.create_task(self.compare(pool)))

    def stop(self) -> None:
        """End a comparison that `begin` has begun."""
        if self._comparing:
            self._comparing.cancel()

    async def _answers(self, pool: ReplicaPool[Teacher]) -> dict[Replica[Teacher], Floats]:
        """Who is late, or cannot answer, is not judged; who is lost is retired."""
        asked = pool.serving
        calls = (each.call(Teacher.probe) for each in asked)
        answers: dict[Replica[Teacher], Floats] = {}
        for each, answer in zip(
            asked, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(answer, ActorLost):
                pool.retire(each, f"{answer}")
            elif isinstance(answer, BaseException):
                if not isinstance(answer, AsyncOpdError):
                    raise answer
            else:
                answers[each] = answer
        return answers

    def _majority(self, answers: Answers) -> Floats | None:
        """What more than half of them say."""
        for answer in answers.values():
            if 2 * sum(self._agree(answer, other) for other in answers.values()) > len(answers):
                return answer
        return None

    def _undecided(self, pool: ReplicaPool[Teacher], answers: Answers) -> Floats:
        """What the first says, where the others can be replaced."""
        (first, right), *others = answers.items()
        names = ", ".join(each.name for each, answer in others if not self._agree(answer, right))
        if self.moving or not pool.can_grow:
            gap = next(self._gap(t, right) for _, t in others if not self._agree(t, right))
            raise ScorerDiffers(f"{names}: {gap} what {first.name} says of the probe")
        return right

    def _retire(self, pool: ReplicaPool[Teacher], replica: Replica[Teacher], why: str) -> None:
        self._note(replica)
        pool.retire(replica, f"{replica.name}: {why}", blameless=True)

    def _note(self, replica: Replica[Teacher]) -> None:
        """Note that it differs: the one that takes its place decides, but for a server beside
        others that have been right, which is the same one again."""
        if not self._served or self._right is None:
            self._differed.add(replica.index)

    def _agree(self, one: Floats, other: Floats) -> bool:
        return self._difference(one, other) <= self._bound

    def _gap(self, one: Floats, other: Floats) -> str:
        worst, gap = self._worst.__name__, self._difference(one, other)
        return f"its log-probs are {gap:.2e} nats ({worst}; allowed are {self._bound:g}) from"

    def _difference(self, one: Floats, other: Floats) -> float:
        """What neither can score is the same, and what one of them cannot is infinitely far."""
        if one.shape != other.shape:
            return np.inf
        gap = np.where(np.isnan(one) & np.isnan(other), 0, np.abs(one - other))
        return float(self._worst(np.nan_to_num(gap, nan=np.inf)))
