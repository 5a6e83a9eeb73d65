"""A port over an actor: which calls it has, how they travel, and what may not be given to one."""

import asyncio
import re

import numpy as np
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import ActorLost, CallFailed, WireError
from async_opd.core.ports import Generator, Learner, Teacher, Verifier, declared
from async_opd.core.wire import Prompt, Sampling
from async_opd.objectives.opd import Opd
from async_opd.runtime.actors import refuse_unsendable
from async_opd.runtime.batcher import LINGER_S, CallBatcher
from async_opd.runtime.remote_role import RemoteRole
from tests.simulated.runs import acted

TIMEOUTS = {
    "generate": 1.0,
    "score": 2.0,
    "step": 3.0,
    "sync": 4.0,
    "collective": 5.0,
    "stall": 6.0,
}
PROMPT = Prompt(id="a", ids=np.zeros(1, np.int32), answer="")


class Actor:
    """Keeps the calls it gets."""

    name = "actor 0"

    def __init__(self, answer=None):
        self.calls, self.answer = [], answer

    async def call(self, timeout_s, method, *args):
        self.calls.append((timeout_s, method, *args))
        return self.answer

    async def call_keeping(self, timeout_s, refs, how, *args, what=""):
        self.calls.append((timeout_s, how, *args))
        return self.answer, [f"ref {at}" for at in range(refs)]

    async def ask_host(self, timeout_s, method, *args, what=""):
        self.calls.append((timeout_s, method, *args))
        return self.answer

    def kill(self):
        self.calls.append("kill")


async def test_a_call_has_the_time_that_its_port_declares():
    actor = Actor("answer")
    teacher = RemoteRole(actor, Teacher, TIMEOUTS)
    assert await teacher.load("folder") == "answer"
    await teacher.check_health()
    teacher.kill()
    assert actor.calls == [(3.0, "load", "folder"), (6.0, "check_health"), "kill"]


async def test_the_last_result_of_a_group_stays_where_it_is_made():
    actor = Actor("meta")
    generator = RemoteRole(actor, Generator, TIMEOUTS)
    assert await generator.generate(PROMPT) == ("meta", "ref 0")
    assert await generator.respond(PROMPT, Sampling()) == ("meta", "ref 0")
    assert [call[:3] for call in actor.calls] == [
        (None, "call", "generate"),  # bounded in its line
        (None, "call", "respond"),
    ]


async def test_groups_of_one_moment_are_scored_in_one_call_and_each_gets_its_own_error():
    actor = Actor([("",), CallFailed("b: no logit"), ("", "nan")])
    teacher = RemoteRole(actor, Teacher, TIMEOUTS)
    scores = await asyncio.gather(*map(teacher.score, "abc"), return_exceptions=True)
    assert scores[::2] == [(("",), "ref 0"), (("", "nan"), "ref 2")]
    assert f"{scores[1]}" == "b: no logit"
    assert actor.calls == [(None, "each_kept", "score", "a", "b", "c")]


async def test_a_verdict_that_is_slow_is_asked_for_by_its_ticket():
    class Slow(Actor):
        async def ask_host(self, timeout_s, method, *args, what=""):
            await super().ask_host(timeout_s, method, *args)
            return "right" if method == "late" else [("wrong",), "ticket"]

    actor = Slow()
    verifier = RemoteRole(actor, Verifier, TIMEOUTS)
    assert await asyncio.gather(verifier.check("a"), verifier.check("b")) == [("wrong",), "right"]
    assert actor.calls == [(None, "each", "check", "a", "b"), (None, "late", "ticket")]


def test_every_call_of_a_port_is_declared_but_for_those_over_several_actors():
    for port in (Generator, Teacher, Verifier, Learner):
        calls = {name for name, value in vars(port).items() if asyncio.iscoroutinefunction(value)}
        over_all = {"step", "open_group", "join_group", "leave_group"} if port is Learner else set()
        assert set(declared(port)) == calls - over_all


class Role:
    """Answers at once, or, where it is told so, once `go` is set."""

    def __init__(self):
        self.go = asyncio.Event()

    async def check(self, group):
        if group == "slow":
            await self.go.wait()
        if group == "odd":
            raise ValueError("odd")
        return (group,)

    def step(self, share, *, groups, scores=()):
        return share, groups, scores


async def test_a_slow_call_does_not_hold_up_those_that_travel_with_it(monkeypatch):
    monkeypatch.setattr("async_opd.runtime.actors.PATIENCE_S", 0.05)
    role = Role()
    actor = acted(role)
    quick, ticket, odd = await actor.each("check", "quick", "slow", "odd")
    assert quick == ("quick",)
    assert type(odd) is CallFailed
    assert re.fullmatch(r"check: ValueError\('odd'\) \(.*test_ports\.py:\d+\)", f"{odd}")
    role.go.set()
    assert await actor.late(ticket) == ("slow",)


async def test_columns_of_references_reach_the_role_as_one_tuple_each():
    columns = {"groups.0": "a", "groups.1": "b", "scores.0": None, "scores.1": "d"}
    found = await acted(Role()).call("step", "share", **columns)
    assert found == ("share", ("a", "b"), (None, "d"))


@pytest.mark.parametrize(
    "arg", [{"a": 1}, [1], (1,), load, load(DEMO, []), object()], ids=lambda arg: type(arg).__name__
)
def test_what_is_no_message_is_not_given_to_a_remote_call(arg):
    with pytest.raises(WireError, match=rf"step: {type(arg).__name__} is given to a remote call"):
        refuse_unsendable("step", [1, arg])


def test_messages_sections_and_plain_values_are():
    config = load(DEMO, [])
    refuse_unsendable("step", [PROMPT, Opd(), config.rollout, config.verify, config.learner])
    refuse_unsendable("step", [None, True, 1, 1.0, "a", b"a", np.zeros(1)])


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
    ask = CallBatcher(remote)
    assert await asyncio.gather(*map(ask, "abc")) == ["A", "B", "C"]
    assert await ask("d") == "D"
    assert remote.calls == [["a", "b", "c"], ["d"]]


async def test_a_request_that_comes_while_a_call_is_under_way_does_not_wait_for_it():
    remote = Remote()
    remote.go.clear()
    ask = CallBatcher(remote)
    first = asyncio.ensure_future(ask("a"))
    await asyncio.sleep(2 * LINGER_S)
    second = asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * LINGER_S)
    assert remote.calls == [["a"], ["b"]]
    remote.go.set()
    assert await asyncio.gather(first, second) == ["A", "B"]


async def test_an_error_of_the_call_is_every_requests_error():
    async def lost(items):
        raise ActorLost("teacher 0 died")

    ask = CallBatcher(lost)
    errors = await asyncio.gather(ask("a"), ask("b"), return_exceptions=True)
    assert [str(error) for error in errors] == ["teacher 0 died"] * 2


async def test_a_caller_that_gives_up_takes_nothing_from_the_others():
    remote = Remote()
    remote.go.clear()
    ask = CallBatcher(remote)
    first, second = asyncio.ensure_future(ask("a")), asyncio.ensure_future(ask("b"))
    await asyncio.sleep(2 * LINGER_S)
    first.cancel()
    remote.go.set()
    assert await second == "B"
    with pytest.raises(asyncio.CancelledError):
        await first
