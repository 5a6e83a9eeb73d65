"""What the parity probe makes of gaps: of roundings, of a router that flips, of stale weights."""

import asyncio

import numpy as np
import pytest

from async_opd.core.errors import ParityError
from async_opd.core.wire import Prompt
from async_opd.driver.parity import (
    AGAIN,
    FIRST,
    TOKENS,
    Gap,
    HalfPrecision,
    Parity,
    prompts_of,
    requests,
)
from async_opd.driver.read_ahead import ReadAhead
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.weight_publisher import WeightPublisher
from tests.simulated.roles import LOGP, Prompts, SimulatedGenerator, SimulatedLearner
from tests.simulated.runs import replica

HALF = HalfPrecision(mean=0.1, drift=0.05)
MAX_NEW_TOKENS = 64


class Learner(SimulatedLearner):
    """Reads what `off(version, tokens, generator)` is apart from what was sampled; counts its
    reads, each of so many tokens."""

    def __init__(self, off):
        super().__init__()
        self.off, self.reads, self.version = off, [], 0

    async def logprobs(self, *ids):
        tokens = sum(map(len, ids[1::2]))
        self.reads.append(tokens)
        return np.full(tokens, LOGP[0]) - self.off(self.version, tokens).astype(np.float32)


class Run:
    """A publisher over such a learner, and what it has told."""

    def __init__(self, off, *, half=HALF, generators=1, tolerance=1e-3):
        self.learner, self.events = Learner(off), []
        self.generators = [Asked() for _ in range(generators)]
        self.publisher = WeightPublisher(
            replica(self.learner),
            ReplicaPool("generator", self.generators),
            parity_every=1,
            tolerance=tolerance,
            half=half,
            emit=lambda *event: self.events.append(event),
        )

    async def __call__(self, *versions: int):
        source = ReadAhead(Prompts(), 8, 10.0)
        try:
            await self.publisher.probe.prepare(source, MAX_NEW_TOKENS, 10**6)
        finally:
            source.close()
        gap = None
        for version in versions:
            self.learner.version = version
            gap = await self.publisher.publish(version, admit=lambda: None)
        return gap


class Asked(SimulatedGenerator):
    """Keeps the prompts that it was probed with."""

    def __init__(self):
        super().__init__()
        self.prompts = []

    async def probe(self, prompt=None, tokens=0):
        if prompt is None:
            return await super().probe()
        self.prompts.append(prompt)
        return await super().probe(prompt, tokens)


def rounding(version: int, tokens: int) -> np.ndarray:
    """What bfloat16 does: a mean of 0.03 nats, and tails."""
    return np.random.default_rng(tokens + version).laplace(0, 0.03, tokens)


def flips(share: float, nats: float):
    """That, and of so many tokens a router that flips."""

    def off(version: int, tokens: int) -> np.ndarray:
        draw = np.random.default_rng(1000 * version + tokens)
        return rounding(version, tokens) + nats * (draw.random(tokens) < share)

    return off


async def test_a_probe_has_256_tokens_behind_prompts_of_the_data_and_is_read_in_one_call():
    run = Run(lambda version, tokens: np.zeros(tokens), half=None, generators=3)
    gap = await run(0, 1)
    assert run.learner.reads == [gap.tokens, gap.tokens]  # of all three at once
    assert gap.tokens == 3 * (TOKENS + len(LOGP))
    assert [len(each.prompts) for each in run.generators] == [64, 64, 64]


@pytest.mark.parametrize(
    ("half", "most", "each", "count"),
    [
        (None, 1, 1, 256),
        (None, 7, 7, 37),
        (None, 64, 8, 32),
        (HALF, 10, 10, 26),
        (HALF, 16384, 32, 8),
    ],
)
def test_short_responses_are_asked_for_more_often(half, most, each, count):
    assert Parity(1e-3, half, print).tokens_each(most) == each
    assert requests(each) == count and count * each >= TOKENS > (count - 1) * each


def test_two_probes_that_follow_each_other_have_other_prompts():
    prompts = [Prompt(id=f"{i}", ids=np.array([i], np.int32), answer="") for i in range(6)]
    turns = [[ids[0] for ids in prompts_of(prompts, 3, drawn)] for drawn in (0, 3, 6)]
    assert turns == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert prompts_of([], 3, 0) == []


async def test_the_prompts_of_the_probe_are_handed_out_none_the_less():
    source = ReadAhead(Prompts(5), 8, 10.0)
    assert [prompt.id for prompt in await source.next_few(9)] == ["0", "1", "2", "3", "4"]
    assert [prompt.id for prompt in source] == ["0", "1", "2", "3", "4"]
    source.close()


@pytest.mark.parametrize("half", [None, HALF])
async def test_rounding_of_half_precision_passes_in_half_precision_alone(half):
    run = Run(rounding, half=half)
    if half is None:
        with pytest.raises(ParityError, match=r"differ by .* sync\.parity_tolerance = 0\.001"):
            await run(0)
        return
    gap = await run(*range(30))
    assert 0.02 < gap.mean < 0.04 and gap.p99 < gap.largest
    assert run.events == []
    assert run.publisher.probe.parity.first == pytest.approx(0.03, abs=0.005)


async def test_in_float32_one_token_of_256_is_enough_and_nobody_is_asked_again():
    def off(version, tokens):
        return np.where(np.arange(tokens) == 100, 2e-3, 0.0)

    run = Run(off, half=None)
    with pytest.raises(ParityError, match=r"^generator 0: log-probs differ by 2\.00e-03 nats"):
        await run(1)
    assert len(run.learner.reads) == 1


@pytest.mark.parametrize(("share", "nats"), [(0.004, 5.0), (0.01, 4.0), (0.002, 12.0)])
async def test_a_router_that_flips_now_and_then_stops_nobody_in_100_updates(share, nats):
    run = Run(flips(share, nats))
    await run(*range(100))
    assert run.events == [] or {what for what, *_ in run.events} == {"parity"}
    assert len(run.events) < 50  # told, and not each time


@pytest.mark.parametrize("since", [0, 1, 7])
async def test_weights_that_are_not_the_learner_s_stop_a_run_by_both_probes_numbers(since):
    def off(version, tokens):
        stale = version >= since
        draw = np.random.default_rng(version)
        return rounding(version, tokens) + stale * draw.exponential(1.0, tokens)

    run = Run(off, generators=2)
    with pytest.raises(ParityError) as raised:
        await run(*range(10))
    said = f"{raised.value}"
    assert said.startswith("generator 0: log-probs differ from the learner's at version")
    assert f"version {since} by " in said
    assert said.count("nats in the mean over") == 2 and "most tokens differ" in said
    assert ("sync.parity_mean = 0.1" in said) is (since == 0)
    assert ("at version 0 + sync.parity_drift = 0.05" in said) is (since > 0)
    tokens = (FIRST if since == 0 else 1) * TOKENS + len(LOGP)
    assert run.learner.reads[-2:] == [2 * tokens, 2 * (AGAIN * TOKENS + len(LOGP))]


async def test_what_a_second_probe_takes_back_is_told_and_the_run_goes_on():
    def off(version, tokens):
        rare = version == 3 and tokens < AGAIN * TOKENS
        return rounding(version, tokens) + (np.arange(tokens) < 10 * rare) * 4.0

    run = Run(off)
    await run(*range(6))
    (event,) = [event for event in run.events if "but over other tokens" in event[2]]
    assert event[:2] == ("parity", "generator 0") and event[2].startswith("version 3: 1.")


async def test_a_drift_below_the_first_bound_is_one_and_none_of_a_run_that_began_so():
    def off(version, tokens):
        return np.full(tokens, 0.01 if version == 0 else 0.07)

    with pytest.raises(ParityError, match=r"allowed is a mean of 0\.06, the 1\.00e-02 at version"):
        await Run(off)(0, 1)
    await Run(lambda version, tokens: np.full(tokens, 0.07))(0, 1)


async def test_the_bound_survives_a_resume_and_without_it_the_first_probe_makes_one():
    off = lambda version, tokens: np.full(tokens, 0.09)  # noqa: E731
    run = Run(off)
    run.publisher.probe.parity.first = 0.01  # as a checkpoint has it
    with pytest.raises(ParityError, match=r"at version 50"):
        await run(50)
    run = Run(off)
    await run(50)
    assert run.publisher.probe.parity.first == pytest.approx(0.09)


async def test_a_log_prob_that_is_no_number_is_no_agreement_in_half_precision_either():
    run = Run(lambda version, tokens: np.where(np.arange(tokens) == 9, np.nan, 0.0))
    with pytest.raises(ParityError, match="nan nats in the mean"):
        await run(0)


async def test_a_log_prob_that_is_a_number_the_second_time_is_no_bound_for_later():
    run = Run(lambda version, tokens: np.full(tokens, np.nan if len(run.learner.reads) < 2 else 0))
    await run(0, 1, 2)
    assert len(run.learner.reads) == 4
    assert run.publisher.probe.parity.first == 0.0


def test_a_long_tail_is_told_once_and_again_when_it_has_doubled():
    events = []
    parity = Parity(1e-3, HALF, lambda *event: events.append(event[2]))
    for p99 in (0.1, 0.6, 0.7, 1.1, 1.3, 2.5, 2.7):
        parity.measured(1, Gap(264, 0.02, 0.05, p99, 3.0))
        parity.first = None
    assert [text.partition("99th ")[2][:7] for text in events] == ["6.0e-01", "1.3e+00", "2.7e+00"]


async def test_a_generator_that_is_lost_in_the_second_probe_is_retired():
    class Dies(Asked):
        async def probe(self, prompt=None, tokens=0):
            if self.version == 1 and len(self.prompts) >= 8 * (FIRST + 1):
                await asyncio.sleep(60)
            return await super().probe(prompt, tokens)

    run = Run(lambda version, tokens: np.full(tokens, 0.5 * (version == 1)))
    run.generators[:] = [Dies()]
    run.publisher._pool._serving[0].port = run.generators[0]
    running = asyncio.ensure_future(run(0, 1))
    while len(run.learner.reads) < 2:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    run.publisher._pool.retire(run.publisher._pool.serving[0], "it died")
    assert (await running).mean == pytest.approx(0.5)
    assert run.publisher._pool.serving == []
