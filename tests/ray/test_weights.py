"""Learner and vLLM hold the same weights after every update: real actors, real gloo, tied and untied."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from async_opd.errors import AsyncOpdError, OverAge
from async_opd.ports import Ready
from async_opd.stream.follow import Followers
from async_opd.stream.pool import Pool
from async_opd.toy import STUDENT
from async_opd.wire import Sampling
from tests.ray.conftest import demo_config, running

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
FAST = ("learner.lr=5e-3", "learner.warmup_steps=0", "learner.schedule=constant", "sync.timeout_s=5")


async def produced(roles, prompts, count: int) -> list[Ready]:
    """`count` freshly generated, scored and verified groups."""

    async def ready(ticket: int) -> Ready:
        prompt = next(prompts)
        meta, group = await roles.generators[ticket % len(roles.generators)].generate(prompt)
        scores, verdicts = await asyncio.gather(
            roles.teachers[""][ticket % len(roles.teachers[""])].score(group), roles.verifier.check(group)
        )
        return Ready(ticket, prompt, meta, group, scores, verdicts, tuple(range(len(meta.spans))))

    return await asyncio.gather(*(ready(ticket) for ticket in range(count)))


def saved_untied(folder: Path, *, seed: int) -> str:
    """A random model with a head of its own and no end token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=24, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def untied(tmp_path):
    return saved_untied(tmp_path / "untied", seed=0)


async def check_three_updates(config, teachers_follow: bool = False):
    async with running(config) as (roles, publisher, prompts):
        probe_ids, probe = await roles.generators[0].probe()
        before = await roles.learner.logprobs(probe_ids, probe.ids)
        gaps = []
        for version in (1, 2, 3):
            result = await roles.learner.step(await produced(roles, prompts, 8))
            assert result.version == version
            gaps.append(await publisher.publish(version, admit=lambda: None))
        after = await roles.learner.logprobs(probe_ids, probe.ids)
        assert max(gaps) <= 1e-4  # the largest over all generators, of freshly sampled tokens
        assert np.abs(after - before).max() > 0.05  # the weights moved by far more than the gap
        if teachers_follow:
            await Followers(
                roles.learner, {1: [Pool("teacher", roles.teachers[""])]}, f"{config.run.dir}/self-teacher"
            ).follow(3)
            for ready in await produced(roles, prompts, 2):
                group, (scores,) = await ready.group, await ready.scores
                logp = await roles.learner.logprobs(group.prompt.ids, group.rollouts[0].ids)
                assert np.abs(scores.sampled_logp - logp).max() <= 1e-4


async def test_tied_student_agrees_with_vllm_after_three_updates_at_temperature_0_7(tmp_path):
    await check_three_updates(demo_config(tmp_path, *FAST, "rollout.temperature=0.7"))


async def test_untied_student_sharded_over_two_ranks_agrees_with_two_generators_and_teachers_after_three_updates(
    tmp_path, untied
):
    pairs = ("rollout.generators=2", "teacher.replicas=2", "learner.ranks=2", "learner.zero_stage=3")
    models = (f"student.model={untied}", f"teacher.model={saved_untied(tmp_path / 'teacher', seed=1)}")
    await check_three_updates(demo_config(tmp_path, *FAST, *pairs, *models), teachers_follow=True)


async def test_updates_in_flight_are_exact_and_a_failed_one_leaves_the_old_version_serving(tmp_path, untied):
    lengths = ("rollout.max_new_tokens=230", "rollout.concurrency=2")
    config = demo_config(tmp_path, *FAST, *lengths, f"student.model={untied}")
    async with running(config, eos_ids=()) as (roles, publisher, prompts):
        (generator,) = roles.generators
        data = await produced(roles, prompts, 2)
        long = asyncio.ensure_future(generator.generate(next(prompts)))
        versions = 0
        while not long.done() and versions < 4:
            await roles.learner.step(data)
            versions += 1
            await publisher.publish(versions, admit=lambda: None)
        meta, ref = await long
        (spans,) = meta.spans
        assert [span.version for span in spans] == list(range(spans[0].version, versions + 1))
        assert len(spans) > 1  # the weights changed under a running request
        rollout, prompt = (await ref).rollouts[0], (await ref).prompt
        logp = await roles.learner.logprobs(prompt.ids, rollout.ids)
        gap = np.abs(logp - rollout.behaviour_logp)
        assert gap[spans[-1].start :].max() <= 1e-4  # the prefix was rebuilt: exact under the live weights
        assert gap[: spans[-1].start].max() > 1e-2  # the other tokens really are of other weights

        info = await roles.learner.update_info()
        with pytest.raises((AsyncOpdError, ray.exceptions.RayTaskError)):
            await generator.update(99, info, 0)  # the learner sends nothing: the broadcast times out
        await generator.resume()
        meta, ref = await generator.generate(next(prompts))
        assert {span.version for span in meta.spans[0]} == {versions}
        group = await ref
        logp = await roles.learner.logprobs(group.prompt.ids, group.rollouts[0].ids)
        assert np.abs(logp - group.rollouts[0].behaviour_logp).max() <= 1e-4

        queued = [asyncio.ensure_future(generator.generate(next(prompts))) for _ in range(4)]
        await roles.learner.step(data)
        # The group is broken: the broadcast over it fails, and is tried again over a new one on the same engine.
        assert await publisher.publish(versions + 1, admit=lambda: None) <= 1e-4
        assert not any(request.done() for request in queued)  # the probe waited for none of them
        await asyncio.gather(*queued)

        fresh = await produced(roles, prompts, 2)
        publisher._max_age = 0  # as where stale groups are dropped, at bound 0
        stale = asyncio.ensure_future(generator.generate(next(prompts)))
        evaluation = asyncio.ensure_future(generator.respond(next(prompts), Sampling()))
        await asyncio.sleep(0.2)  # they have tokens of the version before
        await roles.learner.step(fresh)
        assert await publisher.publish(versions + 2, admit=lambda: None) <= 1e-4
        with pytest.raises(OverAge, match="cut it off, its first tokens are too old"):
            await stale
        meta, _ = await evaluation  # which is none of training's
        assert [span.version for span in meta.spans[0]] == [versions + 1, versions + 2]
        meta, _ = await generator.generate(next(prompts))
        assert {span.version for span in meta.spans[0]} == {versions + 2}
