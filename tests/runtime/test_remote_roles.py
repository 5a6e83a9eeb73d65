import asyncio

import numpy as np
import pytest
from async_opd.runtime.remote_roles import LearnerProxy, TeacherProxy, Together

from async_opd.config.load import load
from async_opd.core.errors import ActorLost
from async_opd.core.ports import Ready
from async_opd.core.wire import GroupMeta, Prompt, Span


class Remote:
    """Records each call, and answers in upper case once `go` is set."""

    def __init__(self):
        self.calls, self.go = [], asyncio.Event()
        self.go.set()

    async def __call__(self, items):
        self.calls.append(items)
        await self.go.wait()
        return [item.upper() for item in items]


async def test_requests_of_one_moment_travel_in_one_call_and_get_their_own_results():
    remote = Remote()
    ask = Together(remote)
    assert await asyncio.gather(*map(ask, "abc")) == ["A", "B", "C"]
    assert await ask("d") == "D"
    assert remote.calls == [["a", "b", "c"], ["d"]]


async def test_a_request_that_comes_while_a_call_is_under_way_does_not_wait_for_it():
    remote = Remote()
    remote.go.clear()
    ask = Together(remote)
    first = asyncio.ensure_future(ask("a"))
    await asyncio.sleep(2 * Together.LINGER_S)
    second = asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * Together.LINGER_S)
    assert remote.calls == [["a"], ["b"]]
    remote.go.set()
    assert await asyncio.gather(first, second) == ["A", "B"]


async def test_an_error_of_the_call_is_every_requests_error():
    async def lost(items):
        raise ActorLost("teacher 0 died")

    ask = Together(lost)
    errors = await asyncio.gather(ask("a"), ask("b"), return_exceptions=True)
    assert [str(error) for error in errors] == ["teacher 0 died"] * 2


async def test_a_caller_that_gives_up_takes_nothing_from_the_others():
    remote = Remote()
    remote.go.clear()
    ask = Together(remote)
    first, second = asyncio.ensure_future(ask("a")), asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * Together.LINGER_S)
    first.cancel()
    remote.go.set()
    assert await second == "B"
    with pytest.raises(asyncio.CancelledError):
        await first


class Rank:
    """An actor that keeps the calls it gets."""

    def __init__(self):
        self.calls = []

    async def call(self, timeout_s, method, *args):
        self.calls.append((timeout_s, method, *args))
        return 8 if method == "width" else None


def ready(at: int, *, tokens: int, scores: str | None = "", reference: str | None = None) -> Ready:
    spans = (Span(version=0, start=0, end=tokens),)
    meta = GroupMeta(id=f"{at}", prompt_len=1, spans=(spans,), truncated=(False,))
    prompt = Prompt(id=f"{at}", ids=np.zeros(1, np.int32), answer="")
    return Ready(
        at,
        prompt,
        meta,
        f"group {at}",
        f"scores {at}" if scores == "" else scores,
        (at,),
        (0,),
        reference,
    )


async def stepped(groups: list[Ready], ranks: int) -> list[tuple]:
    """What the ranks are given of `groups` in a step: (plan, verdicts, *data) each."""
    config = load("configs/demo.toml", ["learner.micro_batch_tokens=80", f"learner.ranks={ranks}"])
    actors = [Rank() for _ in range(ranks)]
    await LearnerProxy(actors, "", config).step(groups)
    return [call[2:] for actor in actors for call in actor.calls if call[1] == "step"]


async def test_without_a_reference_a_rank_gets_groups_then_scores():
    ((plan, verdicts, *data),) = await stepped([ready(0, tokens=50), ready(1, tokens=40)], ranks=1)
    assert sorted(pair for micro in plan for pair in micro) == [(0, 0), (1, 0)]
    assert (verdicts, data) == ([(0,), (1,)], ["group 0", "group 1", "scores 0", "scores 1"])


async def test_with_a_reference_its_scores_come_third_and_none_stands_where_a_group_has_none():
    groups = [ready(0, tokens=5, reference="refs 0"), ready(1, tokens=5, scores=None)]
    ((_, _, *data),) = await stepped(groups, ranks=1)
    assert data == ["group 0", "group 1", "scores 0", None, "refs 0", None]


async def test_each_rank_gets_only_the_groups_it_trains_with_their_own_references():
    groups = [ready(at, tokens=50, reference=f"refs {at}") for at in range(2)]
    calls = await stepped(groups, ranks=2)
    assert sorted(data for _, _, *data in calls) == [
        [f"group {at}", f"scores {at}", f"refs {at}"] for at in range(2)
    ]


async def test_a_teacher_has_as_long_to_load_as_a_checkpoint_may_take():
    actor, config = Rank(), load("configs/demo.toml", ["timeout.step_s=7"])
    await TeacherProxy(actor, config, [1]).load("folder")
    assert actor.calls == [(7.0, "load", "folder")]
