"""What a teacher on the stub is asked, and what the stub's table says of it."""

from contextlib import asynccontextmanager

import numpy as np

from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.server.teacher import ServerTeacher
from tests.roles.teacher.server.stub import LOGP_VV, MODEL, V
from tests.roles.teacher.settings import scorer_settings

KEY = "sk-of-the-test"
NOTHING = Needs()


def group(*lengths: int, prompt: int = 3, real: int = V, id: str = "7@0") -> Group:
    random = np.random.default_rng(len(lengths))

    def drawn(n: int) -> np.ndarray:
        return random.integers(real, size=n, dtype=np.int32)

    rollouts = [
        Rollout(
            id=f"{id}#{i}",
            ids=drawn(n),
            behaviour_logp=np.full(n, -1, np.float32),
            spans=(Span(version=0, start=0, end=n),),
            truncated=False,
        )
        for i, n in enumerate(lengths)
    ]
    return Group(prompt=Prompt(id=id, ids=drawn(prompt), answer=""), rollouts=tuple(rollouts))


@asynccontextmanager
async def teaching(stub, needs=NOTHING, *, within_s=5.0, key=KEY, start=True, real=V, **settings):
    """A teacher on the stub; what it was asked at its start is forgotten."""
    made = ServerTeacher(
        scorer_settings(real, **settings),
        TeacherConfig(model=MODEL),
        needs,
        stub.url,
        key,
        within_s,
    )
    try:
        if start:
            await made.start()
        stub.asked.clear()
        stub.connections.clear()
        stub.busiest = 0
        yield made
    finally:
        await made.close()


def table(group: Group, rollout: Rollout) -> np.ndarray:
    """What the table says behind each token, float64 [T, V]."""
    return LOGP_VV[np.concatenate([group.prompt.ids[-1:], rollout.ids[:-1]])]


async def scores_of(teacher, one):
    causes, scores = await teacher.score(one)
    assert causes == ("",) * len(one.rollouts)
    return scores


def rows(answer):
    return answer["choices"][0]["prompt_logprobs"]
