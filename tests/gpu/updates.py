"""Updates of weights under a running engine, and how far its log-probs are from the learner's."""

import asyncio
import itertools
import time
from collections.abc import Iterable

import numpy as np

from async_opd.config.sections import SyncConfig
from async_opd.core.wire import Group, GroupMeta, Needs, Prompt
from tests.gpu import pair
from tests.gpu.pair import Pair
from tests.gpu.place import Place, Record

RUNNING = 8  # responses at once
MEAN_GAP = SyncConfig().parity_mean
GAP_TOKENS = 1000
CANDIDATES = 64  # ids beside each token


def in_flight(place: Place, record: Record, backend: str, **settings) -> None:
    """Responses run through many updates; each token has a version, and those sampled under the
    live weights have the learner's log-probs. `settings` are those of `pair.start`."""
    asyncio.run(_in_flight(place, record, backend, settings))


async def _in_flight(place: Place, record: Record, backend: str, settings: dict) -> None:
    tokens, versions = (128, 3) if place.tiny else (512, 20)
    both = pair.start(place, backend=backend, tokens=tokens, concurrency=RUNNING, **settings)
    await both.generator.start()
    engine = both.generator._engine.vllm_config
    record(
        "engine",
        v2_runner=int(engine.use_v2_model_runner),
        async_scheduling=int(bool(engine.scheduler_config.async_scheduling)),
        eager=int(engine.model_config.enforce_eager),
    )
    await both.join()
    _, first = await both.generator.generate(both.prompt(0))
    gap, _ = live_gap(both, first)
    record("version 0", gap_mean=gap.mean(), gap_max=gap.max())
    numbers = itertools.count(1)

    def sampled() -> asyncio.Task[tuple[GroupMeta, Group]]:
        return asyncio.create_task(both.generator.generate(both.prompt(next(numbers))))

    running, pauses, interrupted = {sampled() for _ in range(RUNNING)}, [], 0
    means: list[float] = []
    for version in range(1, versions + 1):
        await both.step(first)
        pauses.append(await both.publish(version))
        gaps: list[np.ndarray] = []
        while not gaps:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running |= {sampled() for _ in done}
            for _, group in [await each for each in done]:
                spans = group.rollouts[0].spans
                interrupted += len(spans) > 1
                gaps += [live_gap(both, group)[0]] if spans[-1].version == version else []
        gap = np.concatenate(gaps)
        means.append(gap.mean())
        record(f"version {version}", pause_s=pauses[-1], gap_mean=means[-1], gap_max=gap.max())
    for each in running:
        each.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    (rollout,) = first.rollouts
    live = both.learner.logprobs(first.prompt.ids, rollout.ids)
    moved = np.abs(live - rollout.behaviour_logp).mean()
    both.stop()
    record("all", interrupted=interrupted, pause_s=float(np.median(pauses)), moved=moved)
    assert interrupted, "no response was running while weights changed"
    allowed = min(MEAN_GAP, moved / 3)  # stale weights would be as far off as these moved
    assert all(mean <= allowed for mean in means), f"{means} nats a token, allowed {allowed:.3f}"


def live_gap(both: Pair, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The gap of every token that the live weights have sampled, and what the learner says."""
    (rollout,) = group.rollouts
    assert rollout.spans[-1].version == both.learner.version
    logp = both.learner.logprobs(group.prompt.ids, rollout.ids)
    start = rollout.spans[-1].start
    return np.abs(logp - rollout.behaviour_logp)[start:], logp[start:]


def parity(place: Place, record: Record) -> None:
    """How far engine and learner are from one another in bfloat16, token by token: what the bounds
    of the parity probe are set by."""
    asyncio.run(_parity(place, record))


async def _parity(place: Place, record: Record) -> None:
    tokens = 64 if place.tiny else 250
    both = pair.start(place, backend="gloo", tokens=tokens, concurrency=8)
    await both.generator.start()
    wanted = 2 if place.tiny else GAP_TOKENS // tokens
    # what it reads is its own text, for the model knows random ids no better than a random one
    prompts = [
        Prompt(id=f"{i}", ids=np.concatenate([group.prompt.ids, group.rollouts[0].ids]), answer="")
        for i, (_, group) in enumerate(await answered(both, map(both.prompt, range(wanted))))
    ]
    answers = await answered(both, prompts)
    gaps, logps = zip(*(live_gap(both, group) for _, group in answers), strict=True)
    both.stop()
    gap = np.concatenate(gaps)
    record(
        place.model or "random weights",
        tokens=len(gap),
        mean=gap.mean(),
        rms=float(np.sqrt((gap**2).mean())),
        median=float(np.median(gap)),
        p99=float(np.quantile(gap, 0.99)),
        largest=gap.max(),
        nats_a_token=-np.concatenate(logps).mean(),
    )
    assert gap.mean() <= MEAN_GAP, f"{gap.mean():.3f} nats a token"


def candidates(place: Place, record: Record) -> None:
    """Ids that are drawn beside each token have the learner's log-probs, and so has the token."""
    asyncio.run(_candidates(place, record))


async def _candidates(place: Place, record: Record) -> None:
    needs = Needs(teacher_at_student_ids=CANDIDATES, student_ids="sampled")
    tokens = 32 if place.tiny else 256
    both = pair.start(place, backend="gloo", tokens=tokens, concurrency=RUNNING, needs=needs)
    await both.generator.start()
    runner = int(both.generator._engine.vllm_config.use_v2_model_runner)
    _, group = await both.generator.generate(both.prompt(0))
    (rollout,) = group.rollouts
    ids, logp = rollout.candidate_ids, rollout.candidate_logp
    assert ids is not None and logp is not None and ids.shape == (tokens, CANDIDATES)
    gaps = [live_gap(both, group)[0]]
    for place_in, other in itertools.product((0, tokens // 2, tokens - 1), range(8)):
        response = np.append(rollout.ids[:place_in], ids[place_in, other])
        learners = both.learner.logprobs(group.prompt.ids, response)[-1]
        gaps.append(np.abs(learners - logp[place_in, other : other + 1]))
    both.stop()
    gap = np.concatenate(gaps)
    record(
        f"{CANDIDATES} ids beside each of {tokens} tokens",
        v2_runner=runner,
        different=float(np.mean([len(set(row)) for row in ids.tolist()])),
        gap_mean=gap.mean(),
        gap_max=gap.max(),
    )
    assert gap.mean() <= MEAN_GAP, f"{gap.mean():.3f} nats a token"


async def answered(both: Pair, prompts: Iterable[Prompt]) -> list[tuple[GroupMeta, Group]]:
    """Sample a response to each of `prompts`, all at once."""
    return await asyncio.gather(*map(both.generator.generate, prompts))


def throughput(place: Place, record: Record, **settings) -> None:
    """Tokens a second of an engine that is updated all the time, against one that is left alone;
    `settings` are its generator's."""
    asyncio.run(_throughput(place, record, settings))


async def _throughput(place: Place, record: Record, settings: dict) -> None:
    requests, tokens = (4, 64) if place.tiny else (64, 1024)
    both = pair.start(place, backend="gloo", tokens=tokens, concurrency=requests, **settings)
    await both.generator.start()
    await both.join()

    pauses: list[float] = []

    async def rate(updates: bool) -> float:
        began = time.perf_counter()
        running = asyncio.ensure_future(answered(both, map(both.prompt, range(requests))))
        while updates and not running.done():
            await asyncio.sleep(0.1 if place.tiny else 1.0)
            pauses.append(await both.publish(len(pauses) + 1))
        await running
        return requests * tokens / (time.perf_counter() - began)

    await rate(updates=False)
    alone = await rate(updates=False)
    record("no update", tokens_per_s=alone)
    updated = await rate(updates=True)
    record(
        "an update a second",
        tokens_per_s=updated,
        updates=len(pauses),
        pause_s=float(np.median(pauses)),
        share=updated / alone,
    )
    both.stop()
