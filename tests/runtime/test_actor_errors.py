"""What Ray raises about a call has a name of ours, whatever its kind; no Ray is started."""

import asyncio
from types import SimpleNamespace

import pytest
from ray import exceptions

from async_opd.core.errors import ActorLost, CallFailed, CheckpointError, SystemFailed
from async_opd.launch.restarts import LOST
from async_opd.runtime import nodes
from async_opd.runtime.actors import RemoteActor


def task_error(cause) -> exceptions.RayTaskError:
    text = "Traceback:\n  File role.py\nValueError: the last line"
    return exceptions.RayTaskError("call", text, cause, "RoleActor")


ERRORS = {
    "store": (exceptions.ObjectStoreFullError("full"), SystemFailed, "ObjectStoreFullError: full"),
    "disk": (exceptions.OutOfDiskError("full"), SystemFailed, "OutOfDiskError: "),
    "get": (exceptions.GetTimeoutError("late"), SystemFailed, "score: late"),
    "system": (exceptions.RaySystemError("odd"), SystemFailed, "RaySystemError: "),
    "environment": (exceptions.RuntimeEnvSetupError("no pip"), SystemFailed, "RuntimeEnvSetup"),
    "placement": (exceptions.ActorUnschedulableError("no"), SystemFailed, "ActorUnschedulable"),
    "object": (exceptions.ObjectLostError("00", None, ""), SystemFailed, "ObjectLostError: "),
    "machine": (OSError(28, "No space left on device"), SystemFailed, "No space left on device"),
    "bare": (task_error(None), CallFailed, "ValueError: the last line"),
    "role": (task_error(KeyError("x")), CallFailed, "KeyError: 'x'"),
    "ours": (task_error(CheckpointError("is full")), CheckpointError, "is full"),
    "death": (exceptions.RayActorError(), ActorLost, "teacher 0 died during score"),
}


def actor(**handle) -> RemoteActor:
    made = object.__new__(RemoteActor)
    made.name, made._handle = "teacher 0", SimpleNamespace(**handle)
    return made


@pytest.mark.parametrize("which", ERRORS)
async def test_an_answer_that_ray_refuses(which):
    error, kind, says = ERRORS[which]
    ref = asyncio.get_running_loop().create_future()
    ref.set_exception(error)
    with pytest.raises(kind) as raised:
        await actor()._result(ref, 10, "score")
    assert type(raised.value) is kind and says in str(raised.value)
    assert "\n" not in str(raised.value)
    if kind is not CheckpointError:
        assert str(raised.value).startswith("teacher 0") and isinstance(raised.value, LOST)


@pytest.mark.parametrize("which", ["store", "disk", "system", "machine"])
async def test_a_call_that_ray_does_not_take(which):
    def remote(*_, **__):
        raise ERRORS[which][0]

    sends = SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))
    refusing = actor(call=sends, start=sends)
    for call in (
        refusing.call(1, "score"),
        refusing.call_keeping(1, 1, "call", "score"),
        refusing.ask_host(1, "start"),
    ):
        with pytest.raises(SystemFailed, match=r"^teacher 0, s(core|tart): "):
            await call


def test_a_member_that_cannot_be_killed_ends_nothing_else(monkeypatch):
    def refuses(handle):
        raise exceptions.RaySystemError("not connected")

    monkeypatch.setattr("ray.kill", refuses)
    member = actor()
    member.kill()
    assert member.killed


async def test_nodes_that_ray_cannot_list_are_named(monkeypatch):
    def refuses():
        raise exceptions.RaySystemError("no head")

    monkeypatch.setattr(nodes, "available_resources_per_node", refuses)
    with pytest.raises(SystemFailed, match=r"^Ray, its nodes: RaySystemError: "):
        await nodes.alive_nodes()
