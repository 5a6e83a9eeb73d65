"""The lag bound under many simulated groups: heavy-tailed lengths, several generators, versions
changing in flight."""

import asyncio
import heapq
import itertools
import random
from collections import Counter

import numpy as np
import pytest

from async_opd.core.wire import GroupMeta, Prompt, Span, Verdict
from async_opd.maths import lag
from tests.simulated.runs import admission_over, pools_over

GROUPS_PER_STEP = 8


class Clock:
    """Simulated time: sleepers wake in order, each after everything its predecessor caused has
    run."""

    def __init__(self):
        self.now, self._sleepers, self._order = 0.0, [], itertools.count()

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), woken))
        await woken.wait()

    async def run(self, until: asyncio.Task) -> None:
        while not until.done():
            for _ in range(6):  # let whatever was woken run to its next wait
                await asyncio.sleep(0)
            if self._sleepers and not until.done():
                self.now, _, woken = heapq.heappop(self._sleepers)
                woken.set()


class Simulation:
    """Generator, teacher, verifier and learner as durations. A group's tokens take the version live
    when sampled."""

    def __init__(self, clock: Clock, seed: int):
        self.clock, self.random, self.version = clock, random.Random(seed), 0

    async def generate(self, prompt: Prompt):
        pieces = 1 + min(30, int(self.random.paretovariate(0.9)))
        starts: dict[int, int] = {}
        for token in range(pieces):
            starts.setdefault(self.version, token)
            await self.clock.sleep(1.0)
        ends = [*list(starts.values())[1:], pieces]
        spans = tuple(
            Span(version=v, start=s, end=e) for (v, s), e in zip(starts.items(), ends, strict=True)
        )
        return GroupMeta(id=prompt.id, prompt_len=1, spans=(spans,), truncated=(False,)), None

    async def score(self, group):
        await self.clock.sleep(self.random.expovariate(4.0))
        return ("",), None

    async def check(self, group):
        return (Verdict(id="", reward=1.0),)

    def kill(self) -> None: ...


async def simulate(*, bound: int, stale: str, steps: int, generators: int, seed: int):
    """Returns (lag of each trained token, excluded tokens, times each prompt was trained, queue,
    slots)."""
    clock = Clock()
    world = Simulation(clock, seed)
    trained_lags, excluded, trained = [], 0, Counter()

    async def learn():
        nonlocal excluded
        admission.fill()
        while world.version < steps:
            batch = await queue.take(world.version)
            for ready in batch:
                trained[ready.prompt.id] += 1
                versions = np.concatenate(
                    [[s.version] * (s.end - s.start) for s in ready.meta.spans[0]]
                )
                keep = lag.fresh(versions, world.version, bound)
                trained_lags.extend(world.version - versions[keep])
                excluded += int((~keep).sum())
            await clock.sleep(2.0)
            world.version += 1
            for ready in batch:
                slots.give_back(ready.ticket)
            admission.fill()

    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = admission_over(
            tasks,
            pools_over(generators=[world] * generators, teachers={"": [world]}, verifier=world),
            slots=lag.slots(bound + 1, GROUPS_PER_STEP),
            needed=steps * GROUPS_PER_STEP,
            queue=dict(groups_per_step=GROUPS_PER_STEP, max_lag_steps=bound, stale=stale),
        )
        await clock.run(asyncio.ensure_future(learn()))
    return np.array(trained_lags), excluded, trained, queue, slots


@pytest.mark.parametrize("stale", ["mask", "drop"])
@pytest.mark.parametrize(
    ("bound", "generators", "groups"), [(0, 1, 800), (1, 2, 1600), (4, 3, 2_000)]
)
async def test_no_trained_token_is_older_than_the_bound(stale, bound, generators, groups):
    steps = groups // GROUPS_PER_STEP
    lags, excluded, trained, queue, slots = await simulate(
        bound=bound, stale=stale, steps=steps, generators=generators, seed=bound
    )
    assert lags.max() == bound  # reached, and never exceeded
    assert excluded == 0 or stale == "mask"
    assert sum(trained.values()) == steps * GROUPS_PER_STEP
    assert set(trained.values()) == {1}  # replay-free: no prompt is trained twice
    assert len(queue) == 0
    assert slots.free == slots.count  # every slot came back


async def test_without_the_check_at_consumption_slots_alone_exceed_the_bound():
    lags, excluded, *_ = await simulate(bound=4, stale="mask", steps=200, generators=3, seed=4)
    assert lags.max() == 4
    assert excluded > 0  # tokens the mask had to take out: their lag was above 4


async def test_a_synchronous_run_only_ever_trains_on_the_live_version():
    lags, excluded, *_ = await simulate(bound=0, stale="drop", steps=50, generators=2, seed=1)
    assert set(lags.tolist()) == {0}
    assert excluded == 0
