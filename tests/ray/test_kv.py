"""What a token attended to when weights changed in flight, from a real engine, against a
transformers forward over a KV cache whose entries are of the weights of their time."""

import asyncio
import copy
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import DynamicCache

from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Needs, Prompt, Rollout, Sampling
from async_opd.maths.lag import kv_lag
from async_opd.roles.rollout.config import RolloutConfig
from tests.ray.moving import Moving

if TYPE_CHECKING:
    from async_opd.roles.rollout.generator import RolloutGenerator

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]
V, TOKENS, BLOCK, EXACT = 40, 180, 128, 1e-4
# longer than a cache block; each comes twice, so that there is a prefix to be reused
PROMPTS = [
    Prompt(id=f"{at}", ids=np.arange(at % 5, 200 + at % 5, dtype=np.int32) % V, answer="")
    for at in range(10)
]


class Updated(NamedTuple):
    """A generator, every model whose weights it has had, by version, and how it gets the next."""

    generator: "RolloutGenerator"
    models: list[torch.nn.Module]
    update: Callable[[], Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="module")
async def updated(request, tiny_lm, tmp_path, monkeypatch):
    """Of engines with four places; the parameter says what becomes of KV, how many samples a prompt
    has, and for how many blocks there is room."""
    from async_opd.roles.rollout import generator as module

    kv, samples, blocks = request.param
    with_all = module.engine_args

    def short_of_room(*args, **named):
        made = with_all(*args, **named)
        made.num_gpu_blocks_override = blocks
        return made

    monkeypatch.setattr(module, "engine_args", short_of_room)
    model = tiny_lm(
        vocab_size=V, head_dim=32, max_position_embeddings=512, eos_token_id=None, bos_token_id=None
    )
    model.save_pretrained(tmp_path)
    settings = GeneratorSettings(
        name="generator 0",
        model=str(tmp_path),
        eos_ids=(),
        max_prompt_tokens=256,
        vocabulary=((0, V),),
        backend="gloo",
        seed=0,
        keeps_kv=kv == "keep",
    )
    config = RolloutConfig(
        max_new_tokens=TOKENS, samples_per_prompt=samples, concurrency=4, enforce_eager=True
    )
    generator = module.RolloutGenerator(settings, config, Needs())
    await generator.start()
    moving = Moving(generator, model, timeout_s=60.0)
    await moving.join()
    yield Updated(generator, moving.models, moving.update)
    generator._engine.shutdown()


class Context:
    """The KV of a sequence, which grows a token at a time under the weights that are told."""

    def __init__(self, ids: np.ndarray):
        self.ids = torch.tensor(ids, dtype=torch.int64)
        self._cache = DynamicCache()

    @torch.no_grad()
    def logp(self, model, end: int, fresh_from: int | None = None) -> torch.Tensor:
        """Log-probs [V] of what comes behind `end` tokens, under `model`, which computes the KV
        that is missing, and that from `fresh_from` on anew."""
        if fresh_from is not None:
            # a negative number is what is taken away; 0 takes away nothing
            self._cache.crop(fresh_from - self._cache.get_seq_length())
        held = self._cache.get_seq_length()
        output = model(self.ids[None, held:end], past_key_values=self._cache, use_cache=True)
        return output.logits[0, -1].log_softmax(-1)


def recomputed(models, prompt: Prompt, rollout: Rollout, *, may_preempt: bool = False) -> int:
    """Hold each log-prob against a context of which every update left the KV as it was. Returns how
    often one was computed anew in between, whole or behind its first blocks, which none may be
    unless it `may_preempt`."""
    context = Context(np.concatenate([prompt.ids, rollout.ids]))
    preempted = 0
    for at, (id, version, logp) in enumerate(
        zip(rollout.ids, rollout.versions(), rollout.behaviour_logp, strict=True)
    ):
        end, model = len(prompt.ids) + at, models[version]
        gap = abs(context.logp(model, end)[id] - logp)
        whole = copy.deepcopy(context)
        for blocks in range((end - 1) // BLOCK, -1, -1) if may_preempt and gap > EXACT else ():
            tried = copy.deepcopy(whole)
            gap = abs(tried.logp(model, end, blocks * BLOCK)[id] - logp)
            if gap <= EXACT:
                context, preempted = tried, preempted + 1
                break
        assert gap <= EXACT, f"{rollout.id}, token {at}, {rollout.spans}: off by {gap:.1e}"
    return preempted


@torch.no_grad()
def fresh_gaps(models, prompt: Prompt, rollout: Rollout) -> np.ndarray:
    """Differences [T] from plain forwards of the weights that sampled each token."""
    ids = torch.tensor(np.concatenate([prompt.ids, rollout.ids]), dtype=torch.int64)
    gaps = np.zeros(len(rollout.ids))
    for span in rollout.spans:
        logp = models[span.version](ids[None]).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
        sampled = logp.gather(1, ids[len(prompt.ids) :, None])[:, 0].numpy()
        inside = slice(span.start, span.end)
        gaps[inside] = np.abs(sampled - rollout.behaviour_logp)[inside]
    return gaps


async def in_flight(run: Updated) -> list[tuple[Prompt, Rollout]]:
    """Responses to every prompt, more than there are places for, two of them an evaluation's, with
    three updates meanwhile and one more behind."""
    calls = [asyncio.ensure_future(run.generator.generate(prompt)) for prompt in PROMPTS]
    calls += [
        asyncio.ensure_future(run.generator.respond(prompt, Sampling(temperature=1.0)))
        for prompt in PROMPTS[:2]
    ]
    for _ in range(3):
        await asyncio.sleep(0.25)
        await run.update()
    groups = [group for _, group in await asyncio.gather(*calls)]
    await run.update()
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]


async def check_new_requests(run: Updated) -> None:
    """What is asked for behind an update has nothing of older weights, the probe neither."""
    newest = len(run.models) - 1
    for prompt in PROMPTS[:2]:
        _, group = await run.generator.generate(prompt)
        for rollout in group.rollouts:
            assert {span.version for span in rollout.spans} == {newest}
            assert fresh_gaps(run.models, prompt, rollout).max() <= EXACT
    ids, probe = await run.generator.probe()
    assert fresh_gaps(run.models, Prompt(id="probe", ids=ids, answer=""), probe).max() <= EXACT


@pytest.mark.parametrize("updated", [("keep", 2, None)], indirect=True, ids=["keep"])
async def test_kept_kv_gives_log_probs_along_the_kv_of_its_time_and_none_to_new_requests(updated):
    await updated.generator.probe()  # its prompt is in the cache
    sampled = await in_flight(updated)
    starts = {rollout.spans[0].version for _, rollout in sampled}
    assert len(starts) > 1  # some began behind an update, with prompts that were there before
    assert max(len(rollout.spans) for _, rollout in sampled) > 1
    for prompt, rollout in sampled:
        assert rollout.kept_kv and recomputed(updated.models, prompt, rollout) == 0
    across = [each for each in sampled if len(each[1].spans) > 1]
    assert max(fresh_gaps(updated.models, *each).max() for each in across) > 0.05
    assert all(kv_lag(r.versions(), len(p.ids)).max() > 0 for p, r in across)
    await check_new_requests(updated)


@pytest.mark.parametrize("updated", [("keep", 1, 9)], indirect=True, ids=["short of room"])
async def test_what_is_preempted_for_want_of_room_is_computed_anew_by_the_weights_of_that_moment(
    updated,
):
    sampled = await in_flight(updated)
    anew = [recomputed(updated.models, *each, may_preempt=True) for each in sampled]
    assert sum(anew) > 0
    await check_new_requests(updated)


@pytest.mark.parametrize("updated", [("recompute", 2, None)], indirect=True, ids=["recompute"])
async def test_recomputed_kv_gives_log_probs_of_the_newest_weights_alone(updated):
    await updated.generator.probe()
    sampled = await in_flight(updated)
    assert max(len(rollout.spans) for _, rollout in sampled) > 1
    for prompt, rollout in sampled:
        assert not rollout.kept_kv
        assert fresh_gaps(updated.models, prompt, rollout).max() <= EXACT
    await check_new_requests(updated)
