"""Ids of the behaviour policy beside each token, from a real engine, against a plain forward of the
same weights."""

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
import pytest_asyncio
import torch

from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Needs, Prompt, Rollout, Sampling
from async_opd.roles.rollout.config import RolloutConfig
from tests.ray.moving import Moving

if TYPE_CHECKING:
    from async_opd.roles.rollout.generator import RolloutGenerator

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]
# ids from VOCABULARY on are padding, which a random model likes as well
V, VOCABULARY, K, TEMPERATURE = 40, 25, 4, 0.7
PROMPTS = [
    Prompt(id=str(at), ids=np.arange(3 + at, 15 + at, dtype=np.int32), answer="") for at in range(8)
]


@pytest.fixture(scope="module")
def model(tiny_lm):
    return tiny_lm(
        vocab_size=V, head_dim=32, max_position_embeddings=512, eos_token_id=None, bos_token_id=None
    )


@pytest.fixture(scope="module")
def started(model, tmp_path_factory) -> Iterator[Callable[[str], "RolloutGenerator"]]:
    """Starts a generator of two responses of 400 tokens a prompt, with candidates of a kind."""
    from async_opd.roles.rollout.generator import RolloutGenerator

    folder, engines = str(tmp_path_factory.mktemp("model")), []
    model.save_pretrained(folder)
    config = RolloutConfig(
        max_new_tokens=400,
        samples_per_prompt=2,
        temperature=TEMPERATURE,
        concurrency=64,
        enforce_eager=True,
    )

    def start(which: str) -> "RolloutGenerator":
        settings = GeneratorSettings(
            name="generator 0",
            model=folder,
            eos_ids=(),
            max_prompt_tokens=64,
            vocabulary=((0, VOCABULARY),),
            backend="gloo",
            seed=0,
        )
        needs = Needs(teacher_at_student_ids=K, student_ids=which)
        generator = RolloutGenerator(settings, config, needs)
        engines.append(generator._engine)
        return generator

    yield start
    for engine in engines:
        engine.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def generator(started):
    """A generator whose candidates are draws."""
    generator = started("sampled")
    await generator.start()
    return generator


async def rollouts(generator: "RolloutGenerator") -> list[tuple[Prompt, Rollout]]:
    """Two for each prompt."""
    groups = await asyncio.gather(*(generator.generate(prompt) for prompt in PROMPTS))
    return [(group.prompt, rollout) for _, group in groups for rollout in group.rollouts]


@torch.no_grad()
def forward(model, prompt: Prompt, rollout: Rollout) -> np.ndarray:
    """Log-probs [T, V] of a plain forward at the positions of the response."""
    ids = torch.tensor(np.concatenate([prompt.ids, rollout.ids]), dtype=torch.int64)
    logits = model(ids[None]).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, VOCABULARY:] = -1e9  # are no tokens
    return (logits / TEMPERATURE).log_softmax(-1).numpy()


def gaps(logp_TV: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Largest difference at each position, of the token and of its candidates, [T]."""
    assert rollout.candidate_ids.shape == rollout.candidate_logp.shape == (400, K)
    ids = np.concatenate([rollout.ids[:, None], rollout.candidate_ids], 1)
    logp = np.concatenate([rollout.behaviour_logp[:, None], rollout.candidate_logp], 1)
    return np.abs(np.take_along_axis(logp_TV, ids, 1) - logp).max(1)


async def test_samples_are_independent_draws_of_the_policy_with_its_log_probs(generator, model):
    sampled = await rollouts(generator)
    assert len(sampled) == 16 and not np.array_equal(
        sampled[0][1].candidate_ids, sampled[1][1].candidate_ids
    )
    logp = [forward(model, *each) for each in sampled]
    assert (
        max(
            gaps(logp_TV, rollout).max()
            for logp_TV, (_, rollout) in zip(logp, sampled, strict=True)
        )
        <= 1e-4
    )

    logp_NV = np.concatenate(logp).astype(np.float64)
    p_NV = np.exp(logp_NV)
    ids_NK = np.concatenate([rollout.candidate_ids for _, rollout in sampled])
    token_N = np.concatenate([rollout.ids for _, rollout in sampled])
    # How often each id was drawn, over 6,400 positions, how likely the drawn ones were, and how
    # often two draws of one position were the same id, in standard deviations from what independent
    # draws give: each of the 29 is beyond 5.5 of them once in 26 million times.
    draws = np.bincount(ids_NK.ravel(), minlength=V)
    assert not draws[VOCABULARY:].any()
    z = [((draws - K * p_NV.sum(0)) / np.sqrt(K * (p_NV * (1 - p_NV)).sum(0)))[:VOCABULARY]]
    mean_N = (p_NV * logp_NV).sum(1)
    spread = K * ((p_NV * logp_NV**2).sum(1) - mean_N**2).sum()
    z.append([(np.take_along_axis(logp_NV, ids_NK, 1).sum() - K * mean_N.sum()) / np.sqrt(spread)])
    same_N = (p_NV**2).sum(1)
    for one, other in [
        (ids_NK[:, 0], ids_NK[:, 1]),
        (ids_NK[:, 2], ids_NK[:, 3]),
        (ids_NK[:, 0], token_N),
    ]:
        z.append([((one == other).sum() - same_N.sum()) / np.sqrt((same_N * (1 - same_N)).sum())])
    assert np.abs(np.concatenate(z)).max() < 5.5


async def test_the_likeliest_are_those_of_a_plain_forward_without_padding(started, model):
    likeliest = started("likeliest")
    await likeliest.start()
    for prompt, rollout in await rollouts(likeliest):
        logp_TV = forward(model, prompt, rollout)
        picked_TK = np.take_along_axis(logp_TV, rollout.candidate_ids, 1)
        largest_TK = np.sort(logp_TV[:, :VOCABULARY], 1)[:, : -K - 1 : -1]
        np.testing.assert_allclose(picked_TK, largest_TK, atol=1e-4)
        assert max(rollout.ids.max(), rollout.candidate_ids.max()) < VOCABULARY
        assert all(len(set(ids)) == K for ids in rollout.candidate_ids.tolist())
        assert rollout.candidate_logp is None


async def test_neither_the_probe_nor_a_greedy_response_has_candidates(generator):
    sampling = asyncio.ensure_future(rollouts(generator))  # beside them, in the same batches
    greedy = asyncio.ensure_future(generator.respond(PROMPTS[0], Sampling()))
    _, probe = await generator.probe()
    assert not sampling.done() and not greedy.done()
    _, group = await greedy
    assert probe.candidate_ids is None and group.rollouts[0].candidate_ids is None
    await sampling


async def test_an_evaluation_samples_in_its_own_way(generator, model):
    _, greedy = await generator.respond(PROMPTS[0], Sampling())
    (rollout,) = greedy.rollouts
    likeliest_TV = forward(model, PROMPTS[0], rollout)
    assert (
        np.take_along_axis(likeliest_TV, rollout.ids[:, None], 1)[:, 0]
        >= likeliest_TV.max(1) - 1e-4
    ).all()
    _, narrow = await generator.respond(
        PROMPTS[0], Sampling(samples=3, temperature=0.5, top_p=1e-3)
    )
    # one token is left
    assert [each.ids[:20].tolist() for each in narrow.rollouts] == [rollout.ids[:20].tolist()] * 3
    _, wide = await generator.respond(PROMPTS[0], Sampling(samples=3, temperature=2.0))
    assert len({tuple(each.ids[:20]) for each in wide.rollouts}) == 3


async def test_candidates_across_updates_in_flight_are_of_the_weights_of_their_token(
    generator, model
):
    moving = Moving(generator, model, timeout_s=20.0)
    await moving.join()
    running = asyncio.ensure_future(rollouts(generator))
    while len(moving.models) < 4:
        await asyncio.sleep(0.3)
        await moving.update()

    models, versions = moving.models, set()
    for prompt, rollout in await running:
        for span in rollout.spans:
            versions.add(span.version)
            inside = slice(span.start, span.end)
            assert (
                gaps(forward(models[span.version], prompt, rollout), rollout)[inside].max() <= 1e-4
            )
            assert (
                gaps(forward(models[span.version - 1], prompt, rollout), rollout)[inside].max()
                > 0.05
            )
    assert len(versions) > 1
