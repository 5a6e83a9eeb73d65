"""A teacher on vLLM at the length of a reasoner's responses."""

import asyncio
import time

import numpy as np

from async_opd.core.role_settings import ScorerSettings
from async_opd.core.wire import Group, Needs
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.vllm_teacher import VllmTeacher
from tests.gpu.place import Place, Record
from tests.gpu.ranks import saved
from tests.gpu.student import PROMPT
from tests.roles.learner.trajectories import trajectory

TOPK = 32
TICK_S = 0.005
DEAF_S = 0.05  # that the actor's event loop may be without an answer


def arrays(place: Place, record: Record, k: int) -> None:
    """Scores of long responses: tokens a second, seconds of the actor's own Python a response, and
    how long its event loop is deaf."""
    asyncio.run(_arrays(place, record, k))


async def _arrays(place: Place, record: Record, k: int) -> None:
    model = place.model or saved(place.folder / "teacher", place.small, place.device)
    tokens = place.tokens - PROMPT
    vocabulary = ((0, 40),)  # of `trajectory`
    teacher = VllmTeacher(
        ScorerSettings(
            name="teacher",
            temperature=1.0,
            vocabulary=vocabulary,
            longest=place.tokens,
            eos_ids=(),
            max_new_tokens=tokens,
        ),
        TeacherConfig(model=model, backend="vllm", dtype="bfloat16", batch_tokens=8192),
        Needs(teacher_topk=k),
    )
    await teacher.start()
    made = [
        trajectory(PROMPT, [(0, tokens)], id=f"{i}#0", seed=i)
        for i in range(2 if place.tiny else 8)
    ]
    groups = [Group(prompt=each.prompt, rollouts=(each.rollout,)) for each in made]
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
    teacher._engine.shutdown()
    record(
        f"top {k}, {tokens} tokens",
        tokens_per_s=len(groups) * tokens / seconds,
        python_s=spent / len(groups),
        deaf_s=max(late),
    )
    for (cause,), (scores,) in answers:
        assert scores is not None and np.isfinite(scores.sampled_logp).all(), cause
    assert place.device == "cpu" or max(late) <= DEAF_S, f"deaf for {max(late):.3f} s"
