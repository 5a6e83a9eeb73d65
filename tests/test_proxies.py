import asyncio

import numpy as np
import pytest

from async_opd.cli import DEMO
from async_opd.config import load
from async_opd.errors import ActorLost
from async_opd.ports import Ready
from async_opd.proxies import LearnerProxy, Together
from async_opd.wire import GroupMeta, Prompt, Span, StepResult


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
    """Keeps what each step was called with."""

    async def call(self, timeout_s, method, *args):
        if method == "width":
            return 64
        self.plan, self.verdicts, self.data = args[0], args[1], args[2:]
        return StepResult(version=1, metrics={})


def group(id: int, tokens: int, samples: int = 1, taught: bool = False) -> Ready:
    """A group of `samples` of `tokens` each, behind a prompt of one token."""
    meta = GroupMeta(
        id=str(id), prompt_len=1, spans=((Span(version=0, start=0, end=tokens),),) * samples,
        truncated=(False,) * samples,
    )  # fmt: skip
    prompt = Prompt(id=str(id), ids=np.zeros(1, np.int32), answer="", taught=taught)
    scores = None if taught else f"scores {id}"
    return Ready(id, prompt, meta, f"group {id}", scores, (f"verdict {id}",), tuple(range(samples)))


async def stepped(*groups: Ready, ranks: int = 2) -> list[Rank]:
    members = [Rank() for _ in range(ranks)]
    await LearnerProxy(members, "", load(DEMO, ["learner.micro_batch_tokens=80"])).step(list(groups))
    return members


async def test_what_the_teacher_answered_trains_in_micro_batches_of_its_own_as_many_on_every_rank():
    groups = [group(0, 30, samples=2), group(1, 10, taught=True), group(2, 50, samples=2), group(3, 10, taught=True)]
    ranks = await stepped(*groups, group(4, 10, taught=True))
    taught = {1, 3, 4}
    seen, kinds = [], []
    for rank in ranks:
        used = [int(data.split()[1]) for data in rank.data[: len(rank.verdicts)]]
        assert rank.data[len(used) :] == tuple(None if g in taught else f"scores {g}" for g in used)
        assert rank.verdicts == [(f"verdict {g}",) for g in used]
        micros = [[(used[g], s) for g, s in micro] for micro in rank.plan]
        seen += [pair for micro in micros for pair in micro]
        kinds.append([{g in taught for g, _ in micro} for micro in micros])
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0)]
    assert kinds == [[{False}, {False}, {True}]] * 2  # 51 + 31 tokens are over 80, 2 x 11 are not


async def test_a_step_without_them_has_no_micro_batch_more():
    (rank,) = await stepped(group(0, 30), group(1, 30), ranks=1)
    assert rank.plan == [[(0, 0), (1, 0)]]


async def test_a_step_of_nothing_else_is_planned_too():
    ranks = await stepped(group(0, 30, taught=True))
    assert [rank.plan for rank in ranks] == [[[(0, 0)]], [[]]]
