"""The connection to a cluster, its nodes as Ray has them, and the wait for room on them."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from async_opd.core.errors import ClusterTooSmall, ConfigError
from async_opd.core.events import EventSink
from async_opd.core.process_wide import log_level, signals_as_before
from async_opd.runtime.placement import Node, ResourceRequest, place

POLL_S = 1.0  # between two looks for room
_started = ExitStack()  # ends what `start_ray` has begun


def start_ray() -> None:
    """Connect to the cluster at RAY_ADDRESS, or to one that `ray start` has started here, or start
    a local one, unless that is done: a caller's own connection stays the caller's. From the main
    thread only."""
    if ray.is_initialized():
        return
    # ray.init takes SIGTERM for an exit at once
    with ExitStack() as undo, signals_as_before(signal.SIGTERM):
        undo.enter_context(log_level(logging.ERROR, logging.getLogger("ray")))
        undo.callback(ray.shutdown)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, AuthenticationError) as e:
            raise ConfigError(f"RAY_ADDRESS = {os.environ.get('RAY_ADDRESS', '')!r}: {e}") from e
        _started.push(undo.pop_all())


def taken_over() -> ExitStack:
    """Hand over what `start_ray` has begun, to be ended by the one who takes it and by nobody else;
    nothing, where it has begun nothing."""
    return _started.pop_all()


def driver_node() -> str:
    """Name the driver's node."""
    return ray.get_runtime_context().get_node_id()


def alive_nodes(members: Sequence[tuple[str | None, ResourceRequest]] = ()) -> list[Node]:
    """List the nodes that live, with what lives there of `members`, by node."""
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
    with ExitStack() as removing:
        while True:
            try:
                return place(requests, alive_nodes(), driver_node())
            except ClusterTooSmall as e:
                if time.monotonic() > until:
                    raise
                if group is None:
                    emit("waits", "run", f"at most {within_s:g} s for room: {e}")
                    group = placement_group(
                        [{"GPU": each.gpus} for each in requests for _ in each.members if each.gpus]
                    )
                    removing.callback(remove_placement_group, group)
            if had:
                await asyncio.sleep(POLL_S)
            elif had := await asyncio.to_thread(group.wait, POLL_S):
                # there is room: it is free as soon as Ray's books say so
                removing.close()
