"""The probe that proves that weights have arrived: generators sample, and the learner reads it."""

import asyncio
from collections.abc import Sequence

import numpy as np

from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, ParityError, TimedOut
from async_opd.core.ports import Generator, Learner
from async_opd.core.wire import Floats, Ints, Prompt, Rollout
from async_opd.driver.parity import AGAIN, Gap, Parity, prompts_of, requests
from async_opd.driver.read_ahead import ReadAhead
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool

Member = Replica[Generator]
Sampled = tuple[Ints, Rollout]  # behind a prompt
Asked = list[tuple[Member, list[asyncio.Task[Sampled]]]]


class ParityProbe:
    """Probes of the generators of one run. Each samples behind a prompt of its own, which is longer
    than a block of its prefix cache, and behind prompts of the run's data, which change from probe
    to probe."""

    def __init__(
        self, learner: Replica[Learner], pool: ReplicaPool[Generator], parity: Parity
    ) -> None:
        self.parity = parity
        self._learner = learner
        self._pool = pool
        self._prompts: Sequence[Prompt] = ()
        self._requests = self._tokens = 0
        self._drawn = 0  # prompts so far

    async def prepare(self, source: ReadAhead, max_new_tokens: int, left: int) -> None:
        """Sample behind the prompts that come next of `source`, of which `left` are to be handed
        out, for the rest of the run; a response has at most `max_new_tokens`."""
        self._tokens = self.parity.tokens_each(max_new_tokens)
        self._requests = requests(self._tokens)
        count = 2 * self.parity.times * self._requests
        self._prompts = await source.next_few(min(count, left))

    def begin(self, members: Sequence[Member], times: int = 0) -> Asked:
        """Have each of `members` sample, whenever it runs; the requests leave before anything that
        the caller sends from now on. They are `times` as many as are enough, or as many as
        version 0 wants."""
        count = (times or self.parity.times) * self._requests
        prompts = prompts_of(self._prompts, count, self._drawn)
        self._drawn += count
        return [
            (
                each,
                [
                    retrieved(asyncio.create_task(call))
                    for call in (
                        each.call(Generator.probe),
                        *(each.call(Generator.probe, ids, self._tokens) for ids in prompts),
                    )
                ],
            )
            for each in members
        ]

    async def judged(self, version: int, asked: Asked) -> Gap | None:
        """Measure how far the generators that were `asked`, together, are from the learner; None
        where none is left to answer. One that is further than allowed is asked once more, for other
        tokens, where rounding may be the cause. Raises ParityError."""
        read = await self._read(version, asked)
        doubtful = {each: gap for each, (gap, *_) in read.items() if not self.parity.allows(gap)}
        if doubtful:
            await self._judged_again(version, doubtful)
        if not read:
            return None
        _, learner, generators = zip(*read.values(), strict=True)
        gap = Gap.of(np.concatenate(learner), np.concatenate(generators))
        self.parity.measured(version, gap)
        return gap

    async def _judged_again(self, version: int, doubtful: dict[Member, Gap]) -> None:
        if not self.parity.asks_twice:
            for each, gap in doubtful.items():
                raise self.parity.error(each.name, version, gap)
        read = await self._read(version, self.begin([*doubtful], AGAIN))
        for each, (again, *_) in read.items():
            if not self.parity.allows(again):
                raise self.parity.error(each.name, version, doubtful[each], again)
            self.parity.passed_again(each.name, version, doubtful[each], again)

    async def _read(self, version: int, asked: Asked) -> dict[Member, tuple[Gap, Floats, Floats]]:
        """Have the learner read, in one call, what each has sampled: how far it is from that, and
        the log-probs of both. One that is lost is retired, and has none."""
        sampled: dict[Member, list[Sampled]] = {}
        for member, answers in asked:
            try:
                sampled[member] = [await answer for answer in answers]
            except (ActorLost, TimedOut) as e:
                self._pool.retire(member, str(e))
        for rollout in (rollout for pairs in sampled.values() for _, rollout in pairs):
            if {span.version for span in rollout.spans} != {version}:
                raise ParityError(
                    f"{rollout.id}: sampled under {rollout.spans}, expected version {version}"
                )
        if not sampled:
            return {}
        pairs = [pair for pairs in sampled.values() for pair in pairs]
        ids = [ids for prompt, rollout in pairs for ids in (prompt, rollout.ids)]
        learner = await self._learner.call(Learner.logprobs, *ids)
        read: dict[Member, tuple[Gap, Floats, Floats]] = {}
        start = 0
        for member, pairs in sampled.items():
            generator = np.concatenate([rollout.behaviour_logp for _, rollout in pairs])
            mine = learner[start : start + len(generator)]
            start += len(generator)
            read[member] = Gap.of(mine, generator), mine, generator
        return read
