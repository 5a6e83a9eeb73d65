"""10^5 completions in any order, half of them under each policy: no trained token is older than the
bound, and every group that was handed out is accounted for."""

import asyncio
import random
from collections import Counter

import numpy as np
import pytest

from async_opd.core.wire import GroupMeta, Prompt, Span, Verdict
from async_opd.maths import lag
from tests.simulated.runs import admission_over, pools_over

PER_STEP, BOUND, COMPLETIONS = 50, 4, 50_000
AT_ONCE = 7  # complete, at most, before anybody else runs


class Shuffled:
    """Generator, teacher and verifier. Whatever was handed out completes when the test says so: one
    token of each version that was live meanwhile; one group in fifty is cut, and then has nothing
    to train."""

    def __init__(self):
        self.version, self.random = 0, random.Random(0)
        self.pending: list[asyncio.Future] = []
        self.handed_out: Counter[str] = Counter()

    async def generate(self, prompt: Prompt):
        self.handed_out[prompt.id] += 1
        since, done = self.version, asyncio.get_running_loop().create_future()
        self.pending.append(done)
        await done
        spans = tuple(
            Span(version=v, start=at, end=at + 1)
            for at, v in enumerate(range(since, self.version + 1))
        )
        cut = self.random.random() < 0.02
        return GroupMeta(id=prompt.id, prompt_len=1, spans=(spans,), truncated=(cut,)), None

    async def score(self, group):
        return ("",), None

    async def check(self, group):
        return (Verdict(id="", reward=1.0),)

    def kill(self) -> None: ...

    def complete(self) -> None:
        """One of those that are pending: now and then the newest, mostly any."""
        at = (
            len(self.pending) - 1
            if self.random.random() < 0.3
            else self.random.randrange(len(self.pending))
        )
        self.pending[at], self.pending[-1] = self.pending[-1], self.pending[at]
        self.pending.pop().set_result(None)


async def settle() -> None:
    """Until whoever can run has run."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stale", ["mask", "drop"])
async def test_the_bound_is_exact_and_the_causes_add_up(stale):
    world = Shuffled()
    trained, lags, masked, in_flight = Counter(), Counter(), 0, 0
    async with asyncio.TaskGroup() as tasks:
        admission, queue, slots = admission_over(
            tasks,
            pools_over(generators=[world], teachers={"": [world]}, verifier=world),
            slots=lag.slots(BOUND + 1, PER_STEP),
            needed=COMPLETIONS,
            queue=dict(groups_per_step=PER_STEP, max_lag_steps=BOUND, stale=stale),
            truncated="drop",
        )
        admission.fill()
        taking = asyncio.ensure_future(queue.take(0))
        completed = 0
        while completed < COMPLETIONS:
            await asyncio.sleep(0)  # what was handed out reaches the generator
            for _ in range(min(AT_ONCE, len(world.pending), COMPLETIONS - completed)):
                world.complete()
                completed += 1
            if not taking.done():
                continue
            for group in taking.result():
                trained[group.prompt.id] += 1
                aged = world.version - np.array([span.version for span in group.meta.spans[0]])
                lags.update(aged[aged <= BOUND].tolist())
                masked += int((aged > BOUND).sum())
                slots.give_back(group.ticket)
            world.version += 1
            admission.fill()
            taking = asyncio.ensure_future(queue.take(world.version))
        await settle()
        in_flight = len(world.pending)
        # of a step that nobody trains any more
        ready = len(queue) + (PER_STEP if taking.done() else 0)
        taking.cancel()
        for pending in world.pending:
            pending.cancel()
    handed_out = world.handed_out.total()
    assert set(trained.values()) == {1}
    assert set(lags) == set(range(BOUND + 1))  # reached, and never exceeded
    assert (masked > 0) == (stale == "mask")
    assert set(queue.dropped) == {"truncated"} | ({"stale"} if stale == "drop" else set())
    assert slots.count - slots.free == ready + in_flight
    assert handed_out == trained.total() + queue.dropped.total() + ready + in_flight
