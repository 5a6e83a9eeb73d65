"""Heads with rows that are no tokens, and stops, with real actors."""

import asyncio
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd.core.wire import Sampling
from async_opd.toy import STUDENT
from tests.ray.conftest import demo_config, running
from tests.ray.test_weights import FAST, Running, check_three_updates

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
TOKENS, PADDED = 24, 32


def padded(folder: Path) -> str:
    """The shipped student with a head of PADDED rows, of which those behind the tokens are as
    likely as a digit."""
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    model.resize_token_embeddings(PADDED)
    rows = model.get_input_embeddings().weight.data
    rows[TOKENS:] = rows[tokenizer.convert_tokens_to_ids("1")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


async def test_a_head_padded_with_likely_rows_agrees_with_vllm_and_texts_end_responses(tmp_path):
    """The parity probe of every update has what the learner has; no padding is sampled, whatever
    is asked; and a response ends with the first token that completes one of the texts."""
    texts = tuple("".join(pair) for pair in itertools.product("0123456789+=", repeat=2))
    config = demo_config(tmp_path, *FAST, f"student.model={padded(tmp_path / 'student')}")
    async with running(config, stops=texts) as (roles, publisher, prompts):
        await check_three_updates(Running(config, roles, publisher, prompts))
        (generator, *_), asked = roles.generators, list(itertools.islice(prompts, 24))
        refs = await asyncio.gather(
            *(generator.generate(prompt) for prompt in asked),
            *(generator.respond(prompt, Sampling()) for prompt in asked[:4]),
            *(generator.respond(prompt, Sampling(2, 1.0, 0.9)) for prompt in asked[:4]),
        )
        groups = [await ref for _, ref in refs]
    decode = AutoTokenizer.from_pretrained(STUDENT).decode
    stopped = 0
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        ids = rollout.ids.tolist()
        assert max(ids) < TOKENS
        text = decode(ids)
        places = [text.find(stop) + 2 for stop in texts if stop in text]
        assert all(place == len(text) for place in places)  # no token behind it
        assert rollout.stop_tokens == (2 if places else 0)
        assert rollout.truncated == (not places and ids[-1] != 1)
        stopped += bool(places)
    assert stopped > 2  # of 36, of which a third are expected to
