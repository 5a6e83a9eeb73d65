"""Every backend scores as a plain forward of the model does, one rollout at a time: one check that
all of them pass."""

import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from msgspec.structs import replace

from async_opd.core.errors import ActorLost
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from tests.processes import command_line
from tests.ray.conftest import demo_config, running
from tests.roles.teacher.anchored import Anchored
from tests.roles.teacher.settings import scorer_settings

# the tokenizer's vocabulary, the model's, and the candidates a position
REAL, PADDED, K = 24, 32, 5
# tokens of the prompt (a block of vLLM's cache is 128), of the teacher's own one, and of the
# responses
SHAPES = [
    (3, None, (4, 1)),
    (1, None, (1,)),
    (150, None, (60, 1, 7)),
    (3, 140, (60, 1)),
    (9, 2, (5,)),
]


@pytest.fixture
def model(tiny_lm, tmp_path):
    """A random teacher with a padded vocabulary, saved in `tmp_path`/teacher as well."""
    model = tiny_lm(
        vocab_size=PADDED, hidden_size=64, head_dim=32, max_position_embeddings=256
    ).eval()
    model.save_pretrained(tmp_path / "teacher")
    return model


def groups() -> list[Group]:
    random = np.random.default_rng(0)

    def rollout(id: str, tokens: int) -> Rollout:
        return Rollout(
            id=id,
            ids=random.integers(REAL, size=tokens, dtype=np.int32),
            behaviour_logp=np.full(tokens, -1, np.float32),
            spans=(Span(version=0, start=0, end=tokens),),
            truncated=False,
        )

    def prompt(tokens: int | None) -> np.ndarray | None:
        return tokens and random.integers(REAL, size=tokens, dtype=np.int32)

    return [
        Group(
            prompt=Prompt(id=f"{at}", ids=prompt(asked), answer="", teacher_ids=prompt(shown)),
            rollouts=tuple(rollout(f"{at}#{i}", tokens) for i, tokens in enumerate(lengths)),
        )
        for at, (asked, shown, lengths) in enumerate(SHAPES)
    ]


@torch.no_grad()
def check(model, group: Group, scores) -> None:
    """Sampled and top-k log-probs against the model's own logits behind the prompt that the teacher
    is shown, to 1e-4 nats, and the mass of all other ids to 1e-4 of it; no candidate is padding."""
    prompt = (
        group.prompt.ids if group.prompt.teacher_ids is None else group.prompt.teacher_ids
    ).tolist()
    for rollout, got in zip(group.rollouts, scores, strict=True):
        ids = torch.tensor([[*prompt, *rollout.ids.tolist()]])
        logp_TV = model(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        sampled_T = [logp_TV[t, token].item() for t, token in enumerate(rollout.ids.tolist())]
        assert got.id == rollout.id
        assert got.sampled_logp == pytest.approx(sampled_T, abs=1e-4)
        np.testing.assert_allclose(got.topk_logp, logp_TV[:, :REAL].topk(K).values, atol=1e-4)
        np.testing.assert_allclose(
            got.topk_logp, logp_TV.gather(1, torch.tensor(got.topk_ids).long()), atol=1e-4
        )
        assert got.topk_ids.max() < REAL
        others_TV = logp_TV.scatter(1, torch.tensor(got.topk_ids).long(), -torch.inf)
        np.testing.assert_allclose(np.exp(got.tail_logp), others_TV.exp().sum(1), atol=1e-4)


async def test_the_transformers_teacher_equals_a_plain_forward(model, tmp_path):
    config = TeacherConfig(model=str(tmp_path / "teacher"))
    needs = Needs(teacher_topk=K, tail=True)
    teacher = TransformersTeacher(scorer_settings(REAL), config, needs)
    for group in groups():
        check(model, group, (await teacher.score(group))[1])


@pytest.mark.ray
@pytest.mark.timeout(300)
async def test_the_vllm_teacher_equals_a_plain_forward_teaches_a_step_and_dies_by_name(
    model, tmp_path
):
    settings = (
        "teacher.backend=vllm",
        f"teacher.model={tmp_path}/teacher",
        f"objective.k={K}",
        "sync.timeout_s=10",
    )
    lengths = ("teacher.max_prompt_tokens=150", "rollout.max_new_tokens=60")
    context = ("teacher.context={solution}={prompt}", "data.solution=answer")
    config = replace(demo_config(tmp_path, *settings, *lengths, *context), objective=Anchored(k=K))
    async with running(config) as (roles, _, prompts):
        (teacher,), (generator,) = roles.teachers[""], roles.generators
        for group in groups():
            check(model, group, await (await teacher.score(group))[1])

        prompt = next(prompts)
        meta, group = await generator.generate(prompt)
        (_, scores), verdicts = await teacher.score(group), await roles.verifier.check(group)
        check(model, await group, await scores)
        assert (
            prompt.teacher_ids[-len(prompt.ids) :].tolist()
            == prompt.ids.tolist()
            != prompt.teacher_ids.tolist()
        )
        (reference,) = roles.references
        _, references = await reference.score(group)
        # before its first step
        logp = await roles.learner.logprobs(prompt.ids, (await group).rollouts[0].ids)
        assert (await references)[0].sampled_logp == pytest.approx(logp, abs=1e-5)
        ready = ScoredGroup(
            ticket=1,
            prompt=prompt,
            meta=meta,
            group=group,
            scores=scores,
            verdicts=verdicts,
            samples=(0,),
            since=0,
            reference=references,
        )
        result = await roles.learner.step([ready])
        assert result.version == 1 and result.metrics["tokens"] == meta.lengths[0]

        (response,) = await teacher.greedy(prompt.ids)
        ids = torch.tensor([[*prompt.ids.tolist(), *response.tolist()]])
        assert (
            response.tolist()
            == model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1, :REAL].argmax(-1).tolist()
        )

        engine_of("ray::Teacher").kill()
        with pytest.raises(ActorLost, match="teacher 0: its engine died"):
            await teacher.score(groups()[0])


def engine_of(actor: str) -> psutil.Process:
    """The engine's process under an actor of this test's own cluster, whose title Ray rewrites with
    each call: it may be read halfway."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess, StopIteration):
            return next(
                process
                for process in psutil.Process().children(recursive=True)
                if "EngineCore" in process.name() + " ".join(command_line(process))
                and actor in " ".join(command_line(process.parent()))
            )
    there = [
        " ".join(command_line(process)) for process in psutil.Process().children(recursive=True)
    ]
    raise AssertionError(f"no engine under {actor}: {there}")
