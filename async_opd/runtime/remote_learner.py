"""The learner over one actor a rank: what each is given of a step, and what all do together."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from async_opd.config.schema import Config
from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost
from async_opd.core.ports import Ref, ScoredGroup
from async_opd.core.wire import Floats, Ints, LearnerShare, StepResult, WeightGroup, WeightLayout
from async_opd.maths.packing import plan
from async_opd.runtime.actors import RemoteActor

LAST_WORDS_S = 5.0  # for the other ranks, once one has failed
T = TypeVar("T")
Micros = list[list[tuple[int, int]]]  # per micro-batch, pairs of (index of group, sample)


class RemoteLearner:
    """`ports.Learner` over actors. Every rank is called with the same methods in the same order."""

    def __init__(self, ranks: Sequence[RemoteActor], address: str, width: int, config: Config):
        """Rank 0 is at `address`; `width` is the hidden size of the student."""
        self.ranks, self._address, self._width = ranks, address, width
        self._micro_batch_tokens = config.learner.micro_batch_tokens
        self._step_s, self._sync_s = config.timeout.step_s, config.sync.timeout_s
        self._engine_ranks = config.rollout.tensor_parallel_size

    async def step(self, groups: Sequence[ScoredGroup]) -> StepResult:
        """Train one optimizer step; the groups are shared out by their tokens."""
        shares = zip(self.ranks, self._plan(groups), strict=True)
        return (await _of_all(self._rank_step(rank, micros, groups) for rank, micros in shares))[0]

    def _plan(self, groups: Sequence[ScoredGroup]) -> list[Micros]:
        """By rank, as many micro-batches on each. What the teacher answered comes last, in
        micro-batches of its own: its loss is another."""
        shares: list[Micros] = [[] for _ in self.ranks]
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
                ranks=len(self.ranks),
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
        )
        columns: dict[str, list[Ref]] = {
            "groups": [group.group for group in mine],
            "scores": [group.scores for group in mine],
        }
        if any(group.reference is not None for group in mine):
            columns["references"] = [group.reference for group in mine]
        return await rank.call(self._step_s, "step", share, **columns)

    async def open_group(self, generators: int) -> list[WeightGroup]:
        """Prepare a weight group with that many generators; returns where each of them joins."""
        sizes = generators, self._engine_ranks
        return await self.ranks[0].call(self._sync_s, "open_group", self._address, *sizes)

    async def join_group(self, generators: int) -> None:
        """Wait until all of them have joined."""
        world = 1 + generators * self._engine_ranks
        await self.ranks[0].call(2 * self._sync_s, "join_group", world)

    async def weight_layout(self) -> WeightLayout:
        """What an update carries."""
        return await self.ranks[0].call(self._sync_s, "weight_layout")

    async def send_weights(self) -> None:
        """Broadcast the live weights."""
        await self._collective(2 * self._sync_s, "send_weights")

    async def logprobs(self, prompt_ids: Ints, response_ids: Ints) -> Floats:
        """Log-probs of a response under the live student, for the parity probe."""
        return await self._collective(self._step_s, "logprobs", prompt_ids, response_ids)

    async def save(self, folder: str) -> None:
        """Write the Hugging Face checkpoint."""
        await self._collective(self._step_s, "save", folder)

    async def save_state(self, folder: str) -> None:
        """Write what `load_state` goes on from."""
        await self._collective(self._step_s, "save_state", folder)

    async def load_state(self, folder: str) -> None:
        """Go on from what `save_state` wrote."""
        await self._collective(self._step_s, "load_state", folder)

    async def _collective(self, timeout_s: float, method: str, *args: Any) -> Any:
        """Call every rank, as ZeRO-3 needs; rank 0's result."""
        return (await _of_all(rank.call(timeout_s, method, *args) for rank in self.ranks))[0]


async def _of_all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of what all ranks do with one another. Where one is lost, that is the error, whatever
    the others say."""
    tasks = [retrieved(asyncio.ensure_future(call)) for call in calls]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if others:  # a dead rank is noticed later than what its death did to them
        done |= (await asyncio.wait(others, timeout=LAST_WORDS_S))[0]
    errors = [error for task in done if (error := task.exception())]
    for task in tasks:
        task.cancel()
    if errors:
        raise next((error for error in errors if isinstance(error, ActorLost)), errors[0])
    return [task.result() for task in tasks]
