"""The nodes of the cluster as Ray has them, and room on them for what a run asks for."""

import asyncio
import time
from collections.abc import Mapping, Sequence

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import placement_group, remove_placement_group

from async_opd.errors import ClusterTooSmall
from async_opd.placement import Ask, Node, place
from async_opd.stream.pool import Tell

POLL_S = 1.0  # between two looks for room


def home() -> str:
    """The driver's node."""
    return ray.get_runtime_context().get_node_id()


def living(members: Sequence[tuple[str | None, Ask]] = ()) -> list[Node]:
    """The nodes that live, with what lives there of `members`, by node."""
    available, nodes = available_resources_per_node(), []
    for node in (node for node in ray.nodes() if node["Alive"]):
        id, resources = node["NodeID"], node["Resources"]
        ours = [ask for at, ask in members if at == id]
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
        # What has just started is not in Ray's books yet, and what others have is in no book of ours.
        free = min(available.get(id, {}).get("GPU", 0.0), gpus - sum(ask.gpus for ask in ours))
        address = node["NodeManagerAddress"]
        nodes.append(Node(id=id, address=address, cpus=cpus, gpus=gpus, free=round(free, 4), members=ours))
    return nodes


async def room(asked: Sequence[Ask], within_s: float, tell: Tell) -> Mapping[str, Node]:
    """The node of each member. Waits for room at most `within_s`, while a placement group that asks for all of it shows
    an autoscaler what is missing. Raises ClusterTooSmall."""
    until, group, had = time.monotonic() + within_s, None, False
    try:
        while True:
            try:
                return place(asked, living(), home())
            except ClusterTooSmall as e:
                if time.monotonic() > until:
                    raise
                if group is None:
                    tell("waits", "run", f"at most {within_s:g} s for room: {e}")
                    group = placement_group([{"GPU": ask.gpus} for ask in asked for _ in ask.members if ask.gpus])
            if had:
                await asyncio.sleep(POLL_S)
            elif had := await asyncio.to_thread(group.wait, POLL_S):
                remove_placement_group(group)  # there is room: it is free as soon as Ray's books say so
    finally:
        if group is not None and not had:
            remove_placement_group(group)
