"""Tables of the config arrive in real engines, which say what they said without them."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from async_opd.core.errors import ConfigError
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherConfig
from tests.roles.teacher.settings import scorer_settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]
V, REAL, K = 40, 25, 4


@pytest.fixture(scope="module")
def saved(tiny_lm, tmp_path_factory) -> tuple[Any, str]:
    model = tiny_lm(
        vocab_size=V, head_dim=32, max_position_embeddings=512, eos_token_id=None, bos_token_id=None
    ).eval()
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def plain(model, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probs [T, V] of a plain forward at the positions of the response."""
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.int64)
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    logits[:, REAL:] = -1e9  # are no tokens
    return logits.log_softmax(-1).numpy()


def generator(folder: str, **engine: Any):
    from async_opd.roles.rollout.generator import RolloutGenerator

    settings = GeneratorSettings(
        name="generator 0",
        model=folder,
        eos_ids=(),
        max_prompt_tokens=200,
        vocabulary=((0, REAL),),
        backend="gloo",
        seed=0,
    )
    config = RolloutConfig(
        max_new_tokens=200, samples_per_prompt=2, concurrency=8, enforce_eager=True, engine=engine
    )
    return RolloutGenerator(settings, config, Needs(teacher_at_student_ids=K))


@pytest.mark.asyncio
async def test_a_generators_table_arrives_and_log_probs_are_of_what_sampled(saved):
    """Pieces of 32 tokens of a prompt, and larger blocks of its cache."""
    model, folder = saved
    made = generator(folder, max_num_batched_tokens=32, block_size=256)
    try:
        await made.start()
        engine = made._engine.vllm_config
        assert engine.scheduler_config.max_num_batched_tokens == 32
        assert engine.cache_config.block_size == 256
        ids = np.arange(150, dtype=np.int32) % 7
        prompts = [Prompt(id=f"{at}", ids=ids[: 100 + at], answer="") for at in range(4)]
        groups = await asyncio.gather(*map(made.generate, prompts))
        for prompt, (_, group) in zip(prompts, groups, strict=True):
            for rollout in group.rollouts:
                logp_TV = plain(model, prompt.ids, rollout.ids)
                sampled_T = logp_TV[np.arange(200), rollout.ids]
                np.testing.assert_allclose(rollout.behaviour_logp, sampled_T, atol=1e-4)
                likeliest_TK = np.sort(logp_TV)[:, : -K - 1 : -1]
                read_TK = np.take_along_axis(logp_TV, rollout.candidate_ids, 1)
                np.testing.assert_allclose(read_TK, likeliest_TK, atol=1e-4)
    finally:
        made._engine.shutdown()


@pytest.mark.asyncio
async def test_a_teachers_table_arrives_and_its_rows_are_in_their_places(saved):
    """Prompts in pieces of 32 tokens, a smaller cache of its own size."""
    from async_opd.roles.teacher.vllm_teacher import VllmTeacher

    model, folder = saved
    config = TeacherConfig(
        model=folder,
        backend="vllm",
        batch_tokens=32,
        engine={"num_gpu_blocks_override": 9, "max_num_seqs": 3},
    )
    settings = scorer_settings(REAL, longest=400, whole=((0, REAL),))
    teacher = VllmTeacher(settings, config, Needs(teacher_topk=K))
    try:
        await teacher.start()
        engine = teacher._engine.vllm_config
        assert engine.cache_config.num_gpu_blocks_override == 9
        assert engine.scheduler_config.max_num_seqs == 3
        random = np.random.default_rng(0)
        rollouts = tuple(
            Rollout(
                id=f"a#{tokens}",
                ids=random.integers(REAL, size=tokens, dtype=np.int32),
                behaviour_logp=np.full(tokens, -1, np.float32),
                spans=(Span(version=0, start=0, end=tokens),),
                truncated=False,
            )
            for tokens in (1, 31, 32, 33, 200)
        )
        prompt = Prompt(id="a", ids=random.integers(REAL, size=70, dtype=np.int32), answer="")
        causes, scores = await teacher.score(Group(prompt=prompt, rollouts=rollouts))
        assert causes == ("",) * 5
        for rollout, got in zip(rollouts, scores, strict=True):
            logp_TV = plain(model, prompt.ids, rollout.ids)
            sampled_T = logp_TV[np.arange(len(rollout.ids)), rollout.ids]
            np.testing.assert_allclose(got.sampled_logp, sampled_T, atol=1e-4)
            read_TK = np.take_along_axis(logp_TV, got.topk_ids, 1)
            np.testing.assert_allclose(got.topk_logp, read_TK, atol=1e-4)
            np.testing.assert_allclose(got.topk_logp, np.sort(logp_TV)[:, : -K - 1 : -1], atol=1e-4)
    finally:
        teacher._engine.shutdown()


def test_what_vllm_says_of_how_a_tables_values_go_together_is_an_error_of_the_config(saved):
    with pytest.raises(ConfigError, match=r"rollout\.engine = .*refused by vLLM: .*prompt_lookup"):
        generator(
            saved[1],
            speculative_config={"method": "ngram", "num_speculative_tokens": 3}
            | {"prompt_lookup_min": 5, "prompt_lookup_max": 2},
        )
