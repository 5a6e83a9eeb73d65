"""The teacher's own generator on real vLLM: whose weights, whose rendering, how many samples, how
long."""

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd.core.vocabulary import Tokens, runs
from async_opd.core.wire import Prompt
from async_opd.runtime.cluster import Cluster
from tests.ray.conftest import demo_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SAMPLING = (
    "teacher_sampling.share=0.5",
    "teacher_sampling.full_until_step=9",
    "teacher_sampling.until_step=9",
)


async def test_a_prompt_is_answered_once_by_the_teachers_weights_in_the_teachers_rendering(
    tmp_path,
):
    config = demo_config(
        tmp_path,
        *SAMPLING,
        "teacher_sampling.max_new_tokens=5",
        "rollout.samples_per_prompt=4",
        "rollout.temperature=0.5",
    )
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    prompt = Prompt(id="a@0", ids=np.array([3, 4], np.int32), answer="")
    rendered = msgspec.structs.replace(prompt, id="b@0", teacher_ids=np.array([5, 6, 7], np.int32))
    tokens = Tokens(student=runs(tokenizer.get_vocab().values()), eos_ids=())
    with Cluster(config, tokens=tokens, tokenizer=tokenizer.backend_tokenizer) as cluster:
        generator = await cluster._spawn("teacher-generator", 0)
        answers = [await generator.generate(asked) for asked in (prompt, rendered)]
        groups = [await ref for _, ref in answers]
    teacher = AutoModelForCausalLM.from_pretrained(config.teacher.model, dtype=torch.float32)
    for (meta, _), group, asked, read in zip(
        answers, groups, (prompt, rendered), ([3, 4], [5, 6, 7]), strict=True
    ):
        (rollout,) = group.rollouts  # one sample, not 4
        assert (group.prompt.id, group.prompt.ids.tolist()) == (asked.id, [3, 4])
        # what the student trains on
        assert (meta.prompt_len, meta.lengths, meta.truncated) == (2, (5,), (True,))
        ids = torch.tensor([[*read, *rollout.ids.tolist()]])
        with torch.no_grad():
            logp_TV = (teacher(ids).logits[0, len(read) - 1 : -1] / 0.5).log_softmax(-1)
        expected = logp_TV.gather(1, ids[0, len(read) :, None])[:, 0]
        np.testing.assert_allclose(rollout.behaviour_logp, expected, atol=1e-4)
