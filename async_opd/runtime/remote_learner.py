"""The learner over one actor a rank: what each is given of a step, and what all do together."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from msgspec.structs import replace

from async_opd.config.schema import Config
from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost
from async_opd.core.ports import Learner, Ref, ScoredGroup, declared
from async_opd.core.weights import WeightGroup
from async_opd.core.wire import LearnerShare, StepResult
from async_opd.maths.packing import plan
from async_opd.runtime.actors import RemoteActor

LAST_WORDS_S = 5.0  # for the other ranks, once one has failed
T = TypeVar("T")
Micros = list[list[tuple[int, int]]]  # per micro-batch, pairs of (index of group, sample)


class RemoteLearner:
    """`ports.Learner` over actors. Every rank is called with the same methods in the same order."""

    def __init__(
        self,
        ranks: Sequence[RemoteActor],
        address: str,
        width: int,
        config: Config,
        timeouts: Mapping[str, float],
    ):
        """Rank 0 is at `address`; `width` is the hidden size of the student."""
        self._ranks = ranks
        self._address = address
        self._width = width
        self._micro_batch_tokens = config.learner.micro_batch_tokens
        self._engine_ranks = config.rollout.tensor_parallel_size
        self._timeouts = timeouts
        for method, how in declared(Learner).items():
            setattr(self, method, partial(self._collective, timeouts[how.within], method))

    async def step(self, groups: Sequence[ScoredGroup]) -> StepResult:
        """Train one optimizer step; the groups are shared out by their tokens."""
        shares = zip(self._ranks, self._plan(groups), strict=True)
        first, *others = await _of_all(
            self._rank_step(rank, micros, groups) for rank, micros in shares
        )
        unscored = [each for result in (first, *others) for each in result.unscored]
        return replace(first, unscored=tuple(unscored))

    def _plan(self, groups: Sequence[ScoredGroup]) -> list[Micros]:
        """By rank, as many micro-batches on each. What the teacher answered comes last, in
        micro-batches of its own: its loss is another."""
        shares: list[Micros] = [[] for _ in self._ranks]
        for from_teacher in (False, True):
            pairs = [
                (g, sample)
                for g, group in enumerate(groups)
                if group.from_teacher == from_teacher
                for sample in group.samples
            ]
            if not pairs:
                continue
            lengths = [groups[g].meta.prompt_len + groups[g].meta.lengths[s] for g, s in pairs]
            planned = plan(
                lengths,
                ranks=len(self._ranks),
                tokens=self._micro_batch_tokens,
                width=self._width,
            )
            for share, micros in zip(shares, planned, strict=True):
                share += [[pairs[i] for i in micro] for micro in micros]
        return shares

    async def _rank_step(
        self, rank: RemoteActor, micros: Micros, groups: Sequence[ScoredGroup]
    ) -> StepResult:
        used = sorted({g for micro in micros for g, _ in micro})
        index = {g: i for i, g in enumerate(used)}
        mine = [groups[g] for g in used]
        share = LearnerShare(
            micro_batches=tuple(tuple((index[g], s) for g, s in micro) for micro in micros),
            verdicts=tuple(group.verdicts for group in mine),
            numbers=tuple(used),
            total=len(groups),
            by_learner=tuple(i for i, group in enumerate(mine) if group.by_learner),
        )
        columns: dict[str, list[Ref]] = {
            "groups": [group.group for group in mine],
            "scores": [group.scores for group in mine],
        }
        if any(group.reference is not None for group in mine):
            columns["references"] = [group.reference for group in mine]
        return await rank.call(self._timeouts["step"], "step", share, **columns)

    async def open_group(self, generators: int) -> list[WeightGroup]:
        """Prepare a weight group with that many generators; returns where each of them joins."""
        sizes = generators, self._engine_ranks
        return await self._ranks[0].call(
            self._timeouts["sync"], "open_group", self._address, *sizes
        )

    async def join_group(self, generators: int) -> None:
        """Wait until all of them have joined."""
        world = 1 + generators * self._engine_ranks
        rank, timeout_s = self._ranks[0], self._timeouts["collective"]
        await rank.call(timeout_s, "join_group", world)

    async def leave_group(self) -> None:
        """End the group; returns once nothing goes on in it any more. Raises TimedOut where that
        cannot be had."""
        await self._ranks[0].call(self._timeouts["sync"], "leave_group")

    async def _collective(self, timeout_s: float, method: str, *args: Any) -> Any:
        """Call every rank; returns rank 0's result."""
        return (await _of_all(rank.call(timeout_s, method, *args) for rank in self._ranks))[0]


async def _of_all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of what all ranks do with one another. Where one is lost, that is the error, whatever
    the others say. What nobody waits for any more is cancelled."""
    tasks = [retrieved(asyncio.ensure_future(call)) for call in calls]
    try:
        done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if others:  # a dead rank is noticed later than what its death did to them
            done |= (await asyncio.wait(others, timeout=LAST_WORDS_S))[0]
    finally:
        for task in tasks:
            task.cancel()
    errors = [error for task in done if (error := task.exception())]
    if errors:
        raise next((error for error in errors if isinstance(error, ActorLost)), errors[0])
    return [task.result() for task in tasks]
