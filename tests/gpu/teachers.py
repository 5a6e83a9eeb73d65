"""A teacher on vLLM at the length of a reasoner's responses."""

import asyncio
import time

import numpy as np
import torch
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM

from async_opd.config.sections import SyncConfig
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.wire import Floats, Group, Ints, Needs, Scores
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.vllm_teacher import VllmTeacher
from tests.gpu.place import Place, Record, Unfit
from tests.gpu.ranks import saved
from tests.gpu.student import PROMPT
from tests.roles.learner.trajectories import trajectory

TICK_S = 0.005
FP8 = (8, 9)  # compute capability
COMPARED = 512  # tokens of a response
DEAF_S = 0.05  # that the actor's event loop may be without an answer


def arrays(
    place: Place, record: Record, k: int = 0, known: int | None = None, given: int = 0, **settings
) -> None:
    """Scores of long responses agree with a plain forward; tokens a second, seconds of the actor's
    own Python a response, and how long its event loop is deaf. The student has ids below `known`
    alone, or all; `given` ids of its are scored; `settings` are the teacher's."""
    model = place.model or saved(place.folder / "teacher", place.small, place.device)
    needs = Needs(teacher_topk=k, teacher_at_student_ids=given)
    if "engine" in settings and torch.cuda.get_device_capability() < FP8:
        raise Unfit("needs a card with fp8")
    groups, scores = asyncio.run(_scored(place, record, model, needs, known, settings))
    response = groups[0].rollouts[0].ids[:COMPARED]
    exact = plain(place, model, np.concatenate([groups[0].prompt.ids, response]))
    gap = np.abs(exact[np.arange(len(response)), response] - scores[0].sampled_logp[:COMPARED])
    record("against a plain forward", gap_mean=gap.mean(), gap_max=gap.max())
    ids, logp = scores[0].topk_ids, scores[0].topk_logp
    if given:
        ids, logp = groups[0].rollouts[0].candidate_ids, scores[0].candidate_logp
    if ids is not None:
        assert logp is not None and ids.max() < (known or exact.shape[1])
        beside = np.abs(np.take_along_axis(exact, ids[:COMPARED], 1) - logp[:COMPARED])
        record("its candidates", gap_mean=beside.mean(), gap_max=beside.max())
        gap = np.concatenate([gap, beside.flatten()])
    # what is quantized says something else, and how much of that is too much is the user's
    assert "engine" in settings or gap.mean() <= SyncConfig().parity_mean, f"{gap.mean():.3f} nats"


def plain(place: Place, model: str, ids: Ints) -> Floats:
    """Log-probs [T, V] of all ids but the prompt's by transformers, in bfloat16."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(place.device)
    with torch.no_grad():
        logits = lm(torch.as_tensor(ids, device=place.device)[None].long()).logits[0]
    return logits[PROMPT - 1 : -1].float().log_softmax(-1).cpu().numpy()


async def _scored(
    place: Place, record: Record, model: str, needs: Needs, known: int | None, settings: dict
) -> tuple[list[Group], list[Scores]]:
    tokens = place.tokens - PROMPT
    every = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    teacher = VllmTeacher(
        ScorerSettings(
            name="teacher",
            temperature=1.0,
            vocabulary=((0, known or every),),
            whole=((0, every),),
            longest=place.tokens,
            eos_ids=(),
            max_new_tokens=tokens,
        ),
        TeacherConfig(model=model, backend="vllm", dtype="bfloat16", batch_tokens=8192, **settings),
        needs,
    )
    await teacher.start()
    made = [
        trajectory(PROMPT, [(0, tokens)], id=f"{i}#0", seed=i)
        for i in range(2 if place.tiny else 8)
    ]
    random = np.random.default_rng(0)
    groups = [
        Group(
            prompt=each.prompt,
            rollouts=(
                replace(
                    each.rollout,
                    candidate_ids=random.integers(
                        every, size=(tokens, needs.teacher_at_student_ids), dtype=np.int32
                    )
                    if needs.teacher_at_student_ids
                    else None,
                ),
            ),
        )
        for each in made
    ]
    await teacher.score(groups[0])
    late: list[float] = []

    async def ticking() -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            late.append(time.perf_counter() - due)

    ticks = asyncio.ensure_future(ticking())
    busy, began = time.process_time(), time.perf_counter()
    answers = await asyncio.gather(*(teacher.score(group) for group in groups))
    seconds, spent = time.perf_counter() - began, time.process_time() - busy
    ticks.cancel()
    runner = int(teacher._engine.vllm_config.use_v2_model_runner)
    teacher._engine.shutdown()
    record(
        f"{tokens} tokens",
        v2_runner=runner,
        tokens_per_s=len(groups) * tokens / seconds,
        python_s=spent / len(groups),
        deaf_s=max(late),
    )
    scores: list[Scores] = []
    for (cause,), (each,) in answers:
        assert each is not None and np.isfinite(each.sampled_logp).all(), cause
        scores.append(each)
    assert place.device == "cpu" or max(late) <= DEAF_S, f"deaf for {max(late):.3f} s"
    return groups, scores
