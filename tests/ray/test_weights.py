"""Learner and vLLM hold the same weights after every update, and whoever dies or hangs in one costs
the timeout and itself: real actors, tied and untied; over gloo, and over vLLM's own `nccl` engine,
for which gloo plays NCCL."""

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pytest_asyncio
import ray
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from async_opd.config.schema import Config
from async_opd.core.errors import AsyncOpdError, OverAge, SyncFailed
from async_opd.core.ports import ScoredGroup
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt, Sampling
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.self_teachers import SelfTeachers
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.toy import STUDENT
from tests.nccl_over_gloo import Specs
from tests.ray.conftest import demo_config, running
from tests.simulated.runs import replica

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]
FAST = (
    "learner.lr=5e-3",
    "learner.warmup_steps=0",
    "learner.schedule=constant",
    "sync.timeout_s=5",
)


async def produced(roles, prompts, count: int) -> list[ScoredGroup]:
    """`count` freshly generated, scored and verified groups."""

    async def ready(ticket: int) -> ScoredGroup:
        prompt = next(prompts)
        meta, group = await roles.generators[ticket % len(roles.generators)].generate(prompt)
        (_, scores), verdicts = await asyncio.gather(
            roles.teachers[""][ticket % len(roles.teachers[""])].score(group),
            roles.verifier.check(group),
        )
        return ScoredGroup(
            ticket=ticket,
            prompt=prompt,
            meta=meta,
            group=group,
            scores=scores,
            verdicts=verdicts,
            samples=tuple(range(len(meta.spans))),
            since=meta.oldest,
        )

    return await asyncio.gather(*(ready(ticket) for ticket in range(count)))


def saved_untied(folder: Path, *, seed: int) -> str:
    """A random model with a head of its own and no end token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)
    return str(folder)


class Running(NamedTuple):
    """A run's actors with version 0 published, by the parts that a test moves on itself."""

    config: Config
    roles: Roles
    publisher: WeightPublisher
    prompts: Iterator[Prompt]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["gloo", "nccl"])
async def untied(tmp_path_factory, request):
    """A student over two ranks, two generators of three requests at a time, two teachers; long
    responses."""
    folder = tmp_path_factory.mktemp("untied")
    config = demo_config(
        folder,
        *FAST,
        f"student.model={saved_untied(folder / 'student', seed=0)}",
        f"teacher.model={saved_untied(folder / 'teacher', seed=1)}",
        "teacher.replicas=2",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "rollout.generators=2",
        "rollout.max_new_tokens=230",
        "rollout.concurrency=3",
        f"sync.backend={request.param}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("async_opd.runtime.cluster.ActorSpecs", Specs)
        patch.setattr("async_opd.runtime.cluster.refuse_without_gpus", lambda *_: None)
        async with running(config, eos_ids=()) as (roles, publisher, prompts):
            yield Running(config, roles, publisher, prompts)


async def check_three_updates(run: Running) -> None:
    roles = run.roles
    probe_ids, probe = await roles.generators[0].probe()
    before = await roles.learner.logprobs(probe_ids, probe.ids)
    gaps = []
    for version in (1, 2, 3):
        result = await roles.learner.step(await produced(roles, run.prompts, 8))
        assert result.version == version
        gaps.append(await run.publisher.publish(version, admit=lambda: None))
    after = await roles.learner.logprobs(probe_ids, probe.ids)
    assert (
        max(gap.largest for gap in gaps) <= 1e-4
    )  # the largest over all generators, of freshly sampled tokens
    assert np.abs(after - before).max() > 0.05  # the weights moved by far more than the gap


async def test_a_tied_student_agrees_with_vllm_after_three_updates_at_temperature_0_7(tmp_path):
    config = demo_config(tmp_path, *FAST, "rollout.temperature=0.7")
    async with running(config) as (roles, publisher, prompts):
        await check_three_updates(Running(config, roles, publisher, prompts))


async def test_an_untied_student_over_two_ranks_agrees_with_two_generators_after_three_updates(
    untied,
):
    await check_three_updates(untied)


async def test_two_teachers_that_follow_score_as_the_student_does(untied):
    roles = untied.roles
    pool = ReplicaPool("teacher", roles.teachers[""])
    folder = Path(untied.config.run.dir, "self-teacher")
    await SelfTeachers(replica(roles.learner), {1: [pool]}, folder).follow(3)
    for ready in await produced(roles, untied.prompts, 2):
        group, (scores,) = await ready.group, await ready.scores
        logp = await roles.learner.logprobs(group.prompt.ids, group.rollouts[0].ids)
        assert np.abs(scores.sampled_logp - logp).max() <= 1e-4


async def test_updates_in_flight_are_exact_and_a_failed_one_is_repeated(untied):
    config, roles, publisher, prompts = untied
    generator = roles.generators[0]
    data = await produced(roles, prompts, 2)

    async def updated(by: WeightPublisher = publisher) -> int:
        """One step more, and its update: the version."""
        version = (await roles.learner.step(data)).version
        assert (await by.publish(version, admit=lambda: None)).largest <= 1e-4
        return version

    version, spans = 0, ()
    # until one was long enough to see the last update
    while len(spans) < 2 or spans[-1].version != version:
        long = asyncio.ensure_future(generator.generate(next(prompts)))
        version = [await updated() for _ in range(2)][-1]
        meta, ref = await long
        (spans,) = meta.spans
    assert [span.version for span in spans] == list(range(spans[0].version, version + 1))
    rollout, prompt = (await ref).rollouts[0], (await ref).prompt
    logp = await roles.learner.logprobs(prompt.ids, rollout.ids)
    gap = np.abs(logp - rollout.behaviour_logp)
    # the prefix was rebuilt: exact under the live weights
    assert gap[spans[-1].start :].max() <= 1e-4
    assert gap[: spans[-1].start].max() > 1e-2  # the other tokens really are of other weights

    layout = await roles.learner.weight_layout()
    with pytest.raises((AsyncOpdError, ray.exceptions.RayTaskError)):
        await generator.update(99, layout, 0)  # the learner sends nothing: the broadcast times out
    if config.sync.backend == "nccl":  # some weights may be new, and none need be whole
        with pytest.raises(SyncFailed, match="its last update broke off half-way"):
            await generator.resume(0)
    else:  # the old version is still whole
        await generator.resume(0)
        meta, ref = await generator.generate(next(prompts))
        assert {span.version for span in meta.spans[0]} == {version}
        group = await ref
        logp = await roles.learner.logprobs(group.prompt.ids, group.rollouts[0].ids)
        assert np.abs(logp - group.rollouts[0].behaviour_logp).max() <= 1e-4

    version = (await roles.learner.step(data)).version
    queued = [asyncio.ensure_future(generator.generate(next(prompts))) for _ in range(6)]
    # The group is broken: the broadcast over it fails, and is tried again over a new one on the
    # same engines.
    assert (await publisher.publish(version, admit=lambda: None)).largest <= 1e-4
    assert not any(request.done() for request in queued)  # the probe waited for none of them
    await asyncio.gather(*queued)

    data = await produced(roles, prompts, 2)
    drops_stale = WeightPublisher(
        replica(roles.learner),
        ReplicaPool("generator", roles.generators),
        parity_every=1,
        tolerance=1e-4,
        max_age=0,
    )
    stale = asyncio.ensure_future(generator.generate(next(prompts)))
    evaluation = asyncio.ensure_future(generator.respond(next(prompts), Sampling()))
    await asyncio.sleep(0.1)
    # sent after them, in the same batches: once it is done they have tokens of this version
    await generator.probe()
    before, version = version, await updated(drops_stale)
    with pytest.raises(OverAge, match="cut it off, its first tokens are too old"):
        await stale
    meta, _ = await evaluation  # which is none of training's
    assert [span.version for span in meta.spans[0]] == [before, version]
    meta, _ = await generator.generate(next(prompts))
    assert {span.version for span in meta.spans[0]} == {version}


DOOMS = [("join", signal.SIGKILL), ("update", signal.SIGKILL), ("update", signal.SIGSTOP)]


async def test_a_generator_that_dies_or_hangs_costs_the_timeout_and_itself(untied):
    """Newcomers join while the others are in flight; then one after another goes, each in a way of
    its own, the last by a `scale` in the midst of an update, and every time the others take the
    version whole."""
    config, roles, _, prompts = untied
    ports = await asyncio.gather(*(roles.spawn("generator", 2 + n) for n in range(len(DOOMS) + 1)))
    pool = ReplicaPool("generator", [*roles.generators, *ports])
    publisher = WeightPublisher(replica(roles.learner), pool, parity_every=1, tolerance=1e-4)
    data = await produced(roles, prompts, 2)
    long = asyncio.ensure_future(roles.generators[1].generate(next(prompts)))
    for doomed, (where, how) in zip(ports, DOOMS, strict=False):
        if where == "update":
            version = (await roles.learner.step(data)).version
            assert (await publisher.publish(version, admit=lambda: None)).largest <= 1e-4
        version = (await roles.learner.step(data)).version
        await doomed._actor.call(5, "doom", where, int(how))
        serving, started = len(pool.serving), time.monotonic()
        assert (await publisher.publish(version, admit=lambda: None)).largest <= 1e-4
        assert len(pool.serving) == serving - 1
        # the driver gives a member up after twice the timeout; and what a busy machine adds
        assert time.monotonic() - started < 2 * config.sync.timeout_s + 20
    version = (await roles.learner.step(data)).version
    publishing = asyncio.ensure_future(publisher.publish(version, admit=lambda: None))
    await asyncio.sleep(0.01)
    pool.resize(2)
    assert ports[-1] in {each.port for each in pool.serving}
    assert (await publishing).largest <= 1e-4
    meta, _ = await long
    assert meta.spans[0][-1].end == 230
    assert {each.port for each in pool.serving} == {*roles.generators}
