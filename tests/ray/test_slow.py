"""Calls of a real actor that takes them up one at a time: when they are late, and what becomes of
those that nobody waits for."""

import asyncio

import pytest
import ray

from async_opd.core.errors import TimedOut
from async_opd.core.ports import Generator, Teacher, Verifier
from async_opd.runtime.actor_specs import ActorSpec
from async_opd.runtime.actors import RemoteActor
from async_opd.runtime.placement import ResourceRequest
from async_opd.runtime.remote_role import RemoteRole

pytestmark = pytest.mark.ray
WITHIN_S = 4.0  # 0.3 of a call and what a busy machine adds; twenty calls take 6
TIMEOUTS = dict.fromkeys(("generate", "score", "step", "sync", "collective", "stall"), WITHIN_S)
GROUPS = [f"{n}" for n in range(20)]
# calls that do not travel together Ray hands over in any order, where they are made at once
APART_S = {"generate": 0.1}
PORTS = {"score": Teacher, "check": Verifier, "generate": Generator}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
async def actor():
    request = ResourceRequest(role="teacher", count=1, gpus=0)
    actor = RemoteActor("teacher 0", ActorSpec("tests.ray.slow:Slow", ()), request, None)
    await actor.ask_host(60, "start")
    yield actor
    actor.kill()


async def made(call, method: str, *groups: str) -> list[asyncio.Future]:
    """Calls for these groups, taken up in their order."""
    calls = []
    for group in groups:
        calls.append(asyncio.ensure_future(call(group)))
        await asyncio.sleep(APART_S.get(method, 0))
    return calls


@pytest.mark.parametrize("method", PORTS)
async def test_twenty_calls_of_a_healthy_role_are_answered_though_they_wait_for_seconds(
    actor, method
):
    call = getattr(RemoteRole(actor, PORTS[method], TIMEOUTS), method)
    await asyncio.gather(*map(call, GROUPS))
    assert {*await actor.call(5, "ended")} == {*GROUPS}  # Ray keeps their order but roughly


@pytest.mark.parametrize("method", PORTS)
async def test_a_call_that_hangs_is_named_and_cancelled_and_the_others_are_answered(actor, method):
    call = getattr(RemoteRole(actor, PORTS[method], TIMEOUTS), method)
    before, hangs, behind = await made(call, method, "before", "hangs", "behind")
    with pytest.raises(TimedOut, match=rf"^teacher 0, {method}: no answer in 4 s$"):
        await hangs
    await asyncio.gather(before, behind)
    assert await actor.call(5, "ended") == ["before", "hangs cancelled", "behind"]


@pytest.mark.parametrize("waits_s", [0.1, 1.0], ids=["in company", "slow"])
@pytest.mark.parametrize("method", PORTS)
async def test_what_nobody_waits_for_any_more_is_cancelled_in_the_actor(actor, method, waits_s):
    call = getattr(RemoteRole(actor, PORTS[method], TIMEOUTS), method)
    hangs, other = await made(call, method, "hangs", "other")
    await asyncio.sleep(waits_s)
    hangs.cancel()
    await other
    assert await actor.call(5, "ended") == ["hangs cancelled", "other"]
