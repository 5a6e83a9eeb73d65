"""The connection to a cluster, its nodes as Ray has them, and the wait for room on them."""

import asyncio
import atexit
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, worker
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import AuthenticationError, RayError, RpcError
from ray.util.placement_group import placement_group, remove_placement_group

from async_opd.core.aside import DaemonThread, aside
from async_opd.core.errors import ClusterTooSmall, ConfigError, SystemFailed, TimedOut
from async_opd.core.events import EventSink
from async_opd.core.foreign import foreign
from async_opd.core.process_wide import held_back, log_level, signals_as_before
from async_opd.runtime.placement import Node, ResourceRequest, place

POLL_S = 1.0  # between two looks for room
ANSWER_S = 2.5  # within which a head that is well answers
ASK_S = 30.0  # within which it says who is there, and who has what
# Without a head Ray ends this process after 60 s, and those of the actors: the rest of that is for
# a last save.
GIVE_UP_S = 20.0
SHUTDOWN_S = 10.0  # to leave the cluster, or to end one of our own: 2 s where nothing hangs
HEAD = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
_started = ExitStack()  # ends what `start_ray` has begun


def start_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS, or to one that `ray start` has started here, or start
    a local one, which only this machine reaches, unless that is done: a caller's own connection
    stays the caller's. From the main thread only."""
    if ray.is_initialized():
        return
    # ray.init takes SIGTERM for an exit at once, and what it starts would end by the SIGHUP of the
    # terminal that they all have, before this process has saved
    with (
        ExitStack() as undo,
        signals_as_before(signal.SIGTERM),
        held_back(signal.SIGHUP),
    ):
        undo.enter_context(log_level(logging.ERROR, logging.getLogger("ray")))
        undo.callback(_shut_down)
        with foreign("Ray, its start", SystemFailed):
            try:
                if _starts_one():
                    undo.enter_context(_on_loopback())
                    _make_token()
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, AuthenticationError) as e:
                address = os.environ.get("RAY_ADDRESS", "")
                raise ConfigError(f"RAY_ADDRESS = {address!r}: {e}") from e
        _started.push(undo.pop_all())


def _starts_one() -> bool:
    """Tell whether ray.init is going to start a cluster, rather than connect to one."""
    if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return False
    nowhere: Any = None  # as ray.init has it
    return canonicalize_bootstrap_address(nowhere) is None


@contextmanager
def _on_loopback() -> Generator[None]:
    """Let every process of a cluster of our own listen on loopback alone. Ray's word for that is
    what it does on a system on which it has no clusters of several nodes: `_node_ip_address` does
    not take 127.0.0.1, nor do all of its processes bind to the address of their node."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _make_token() -> None:
    """Make the token of a cluster of our own, as ray.init does, which lets every user read it.
    Raises ConfigError."""
    path = Path.home() / ".ray" / "auth_token"
    before = os.umask(0o077)
    try:
        enable_token_auth_by_default()
        ensure_token_if_auth_enabled(create_token_if_missing=True)
    except OSError as e:
        raise ConfigError(
            f"{path}: Ray's token cannot be written: {e.strerror}; RAY_AUTH_TOKEN may hold one"
        ) from e
    finally:
        os.umask(before)
    with suppress(OSError):  # none, or another's
        path.chmod(0o600)


def taken_over() -> ExitStack:
    """Hand over what `start_ray` has begun, to be ended by the one who takes it and by nobody else;
    nothing, where it has begun nothing."""
    return _started.pop_all()


def refuse_silent() -> None:
    """Raise ConfigError where what listens at RAY_ADDRESS does not answer as Ray's head: ray.init
    would ask for ever."""
    address = os.environ.get("RAY_ADDRESS", "")
    if re.fullmatch(r"[^/]+:\d+", address) and not ray.is_initialized():
        try:
            DaemonThread("Ray's head").submit(GcsClient, address=address).result(ASK_S)
        except (TimeoutError, RpcError) as e:
            raise ConfigError(
                f"RAY_ADDRESS = {address!r}: no answer of a Ray head in {ASK_S:g} s"
            ) from e


def _shut_down() -> None:
    """Leave the cluster, and end one of our own. Where the head hangs, that does too: what we have
    started is then killed, and the rest is not waited for."""
    node = worker._global_node
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_S)
    if leaving.is_alive():
        atexit.unregister(ray.shutdown)  # it would wait behind this one
        _kill(node)


def kill_own_head() -> None:
    """Kill what Ray has started for this process, and with it the actors, which die with their
    raylet; of a cluster that was there before, nothing."""
    _kill(worker._global_node)


def _kill(node: Any) -> None:
    if node:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def dead_head() -> str:
    """Name the part of the head that died, of a cluster of our own; empty where none did, or the
    cluster is another's."""
    node: Any = worker._global_node
    dead = {kind for kind, _ in node.dead_processes()} if node else set()
    return " and ".join(f"{kind} died" for kind in HEAD if kind in dead)


async def head_lost(every_s: float, patience_s: float) -> str:
    """Look at Ray's head every so many seconds; returns, in words, what is wrong with it once that
    is certain: it died, or was silent for `patience_s`, and GIVE_UP_S at most."""
    node, patience_s = ray.NodeID.from_hex(driver_node()), min(patience_s, GIVE_UP_S)
    silent_s = 0.0
    while True:
        began = time.monotonic()
        await asyncio.sleep(every_s)
        if dead := dead_head():
            return dead
        answer_s = min(ANSWER_S, patience_s)
        worker_here: Any = worker.global_worker
        client = worker_here.gcs_client
        try:
            alive = await aside(2 * answer_s, "Ray's head", client.check_alive, [node], answer_s)
        except (RayError, TimedOut):
            # no longer than a look takes: this process may have stood still itself
            silent_s += min(time.monotonic() - began, every_s + 2 * answer_s)
            if silent_s >= patience_s:
                return f"no answer for {silent_s:.0f} s"
        else:
            silent_s = 0.0
            if not all(alive):
                return "it counts the driver's node among the dead"


@foreign("Ray, the driver's node", SystemFailed)
def driver_node() -> str:
    """Name the driver's node."""
    return ray.get_runtime_context().get_node_id()


async def alive_nodes(members: Sequence[tuple[str | None, ResourceRequest]] = ()) -> list[Node]:
    """List the nodes that live, with what lives there of `members`, by node. Raises TimedOut where
    the head does not say."""
    return await aside(ASK_S, "Ray's head, asked for the nodes", _alive_nodes, members)


@foreign("Ray, its nodes", SystemFailed)
def _alive_nodes(members: Sequence[tuple[str | None, ResourceRequest]]) -> list[Node]:
    available, nodes = available_resources_per_node(), []
    for node in (node for node in ray.nodes() if node["Alive"]):
        id, resources = node["NodeID"], node["Resources"]
        ours = [request for place, request in members if place == id]
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
        # What has just started is not in Ray's books yet, and what others have is in no book of
        # ours.
        free = min(available.get(id, {}).get("GPU", 0.0), gpus - sum(each.gpus for each in ours))
        nodes.append(
            Node(
                id=id,
                address=node["NodeManagerAddress"],
                cpus=cpus,
                gpus=gpus,
                free=round(free, 4),
                members=ours,
            )
        )
    return nodes


async def wait_for_resources(
    requests: Sequence[ResourceRequest], within_s: float, emit: EventSink
) -> Mapping[str, Node]:
    """Choose the node of each member. Waits for room at most `within_s`, while a placement group
    that asks for all of it shows an autoscaler what is missing. Raises ClusterTooSmall."""
    until = time.monotonic() + within_s
    group = None
    had = False
    with foreign("Ray, its placement groups", SystemFailed), ExitStack() as removing:
        while True:
            try:
                return place(requests, await alive_nodes(), driver_node())
            except ClusterTooSmall as e:
                if time.monotonic() > until:
                    raise
                if group is None:
                    emit("waits", "run", f"at most {within_s:g} s for room: {e}")
                    bundles = [each for each in requests for _ in each.members if each.gpus]
                    group = placement_group([{"GPU": each.gpus} for each in bundles])
                    removing.callback(remove_placement_group, group)
            if had:
                await asyncio.sleep(POLL_S)
            elif had := await aside(ASK_S, "Ray's head, asked for room", group.wait, POLL_S):
                # there is room: it is free as soon as Ray's books say so
                removing.close()
