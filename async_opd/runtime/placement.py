"""Where the members of a run live: what each role requests, and the node that each of its members
goes to.

A member is one actor, and the GPUs of an actor are on one node: a tensor-parallel engine never
leaves it. Learner ranks are packed, on the driver's node where they fit; what asks a server is on
the driver's node, from which that server was looked at; the members of any other role are spread,
so that a node that dies takes few of each. CPUs are not reserved: what has no GPU runs on a laptop
of two cores.

Ray's placement groups cannot replace this. Their bundles are fixed when a group is made and free
nothing alone, so a pool that shrinks, grows, or has one member replaced elsewhere would need a new
group, while the rest of the run sits on the old one. A bundle must reserve something, so members
without a GPU, and clusters without one, have no place in a group; one strategy holds for all
bundles, so the packed ranks and the spread pools would be groups that know nothing of each other;
and nothing puts the shares of a card on one card, which `run.share_gpu` needs. `async-opd plan`
asks the same question without a cluster. A group is used for what it can do: by one
`nodes.wait_for_resources` shows an autoscaler what is missing.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import shared_with_learner
from async_opd.core.errors import ClusterTooSmall, ConfigError

RANK = "learner rank"
MOST_MEMBERS = 1024  # of a run: beyond, a number is a slip, and placing them takes a while


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """What a role requests of the cluster."""

    role: str  # a pool's by its name: "generator", "teachers.NAME"
    count: int  # members
    # of each member, on one node; below 1, its share of a card and of the card's memory
    gpus: float
    settings: tuple[str, ...] = ()  # that set it
    packed: bool = False  # on as few nodes as can be; else on as many
    # of what asks servers: the address that each member is known by, in the place of its number;
    # all on the driver's node, from which the servers were looked at
    urls: tuple[str, ...] = ()

    @property
    def members(self) -> list[str]:
        """The names of the members."""
        return [f"{self.role} {each}" for each in self.urls or range(self.count)]


@dataclass(kw_only=True)
class Node:
    """A node of the cluster, and what lives on it."""

    id: str
    address: str
    cpus: float
    gpus: float
    free: float  # of `gpus`
    # of this run: for each the request of its role
    members: list[ResourceRequest] = field(default_factory=list)

    def take(self, request: ResourceRequest) -> None:
        """Add one more member."""
        self.members.append(request)
        self.free = round(self.free - request.gpus, 4)


def resource_requests(config: Config, gpus: bool) -> list[ResourceRequest]:
    """List what `config` requests of a cluster with GPUs, or of one without: the learner first, the
    verifier last."""
    share, pools = config.run.share_gpu, []
    for pool in config.engines:
        size = pool.each.tensor_parallel_size
        split = (f"{pool.section}.tensor_parallel_size",) if size > 1 else ()
        each = pool.each.gpu_memory_utilization if share else float(size)
        pools.append(
            ResourceRequest(
                role=pool.role,
                count=pool.count,
                gpus=each if gpus else 0.0,
                settings=(pool.setting, *split),
                packed=share,
            )
        )
    rank = shared_with_learner(config.engines) if share else 1.0
    return [
        ResourceRequest(
            role=RANK,
            count=config.learner.ranks,
            gpus=rank if gpus else 0.0,
            settings=("learner.ranks",),
            packed=True,
        ),
        *pools,
        *(
            ResourceRequest(
                role=section,
                count=len(scorer.members),
                gpus=0.0,
                settings=(f"{section}.urls",),
                urls=tuple(map(str, scorer.members)),
            )
            for section, scorer in config.served.items()
        ),
        ResourceRequest(role="verifier", count=1, gpus=0.0),
    ]


def place(
    requests: Sequence[ResourceRequest], nodes: Sequence[Node], driver_node: str = ""
) -> dict[str, Node]:
    """Choose the node of each member, by the member's name. Raises ClusterTooSmall with the
    numbers, and ConfigError for more than MOST_MEMBERS."""
    _refuse_absurd(requests)
    # in their order, then the largest first: the learner may take the place of an engine that fits
    # nowhere else
    for order in (requests, sorted(requests, key=lambda request: -request.gpus)):
        places, missing = _placed(order, nodes, driver_node)
        if missing is None:
            return places
    raise _too_small(requests, nodes, missing)


def place_on_alike(
    requests: Sequence[ResourceRequest], gpus: int, count: int | None = None
) -> dict[str, list[str]]:
    """List the members on each of `count` empty nodes of that many GPUs, or of as few as hold them;
    of more than MOST_MEMBERS nodes on the first. Raises ClusterTooSmall, and ConfigError for more
    members."""
    _refuse_absurd(requests)
    count = count and min(count, MOST_MEMBERS)  # a member has one, and is on the first that is free
    # a node for each member
    enough = sum(each.count for each in requests) if all(r.gpus <= gpus for r in requests) else 1
    least = max(int(sum(each.count * each.gpus for each in requests) / gpus), 1)
    for size in range(count or least, count or enough):
        with suppress(ClusterTooSmall):
            return _placed_on_alike(requests, gpus, size)
    return _placed_on_alike(requests, gpus, count or enough)


def _refuse_absurd(requests: Sequence[ResourceRequest]) -> None:
    """Raise ConfigError for more than MOST_MEMBERS."""
    if sum(each.count for each in requests) > MOST_MEMBERS:
        most = max(requests, key=lambda each: each.count)
        named = most.settings[0] if most.settings else most.role
        raise ConfigError(
            f"{named} = {most.count}: a run has at most {MOST_MEMBERS} members, of all roles"
        )


def _placed_on_alike(
    requests: Sequence[ResourceRequest], gpus: int, count: int
) -> dict[str, list[str]]:
    nodes = [
        Node(id=f"{index}", address=f"node {index}", cpus=1, gpus=gpus, free=gpus)
        for index in range(count)
    ]
    places = place(requests, nodes, nodes[0].id)
    return {
        node.address: [member for member, place in places.items() if place.id == node.id]
        for node in nodes
    }


def choose(
    request: ResourceRequest,
    nodes: Sequence[Node],
    driver_node: str = "",
    left: int = 1,
    lost: str = "",
) -> Node | None:
    """Choose the node for one more member, of `left` that are to come; None where there is no room.
    One in place of a member that was `lost` with its node should not go there: Ray takes a dead
    node for a living one for some time."""
    # a node without CPUs is kept free of everything else
    for_all = [node for node in nodes if node.cpus] or nodes
    rooms = [node for node in nodes if node.free >= request.gpus] if request.gpus else for_all
    if request.urls:
        rooms = [node for node in nodes if node.id == driver_node] or rooms

    def packed(node: Node) -> tuple[float, ...]:
        beside, fits = sum(other.packed for other in node.members), node.free >= left * request.gpus
        return -beside, not fits, node.id != driver_node, node.free if fits else -node.free

    def spread(node: Node) -> tuple[float, ...]:
        alike = sum(other.role == request.role for other in node.members)
        return node.id == lost, alike, len(node.members), node.id == driver_node

    return min(rooms, key=packed if request.packed else spread, default=None)


def _placed(
    order: Sequence[ResourceRequest], nodes: Sequence[Node], driver_node: str
) -> tuple[dict[str, Node], ResourceRequest | None]:
    """Place the members that find a node; return the request of the first that finds none, too."""
    nodes, places = [replace(node, members=list(node.members)) for node in nodes], {}
    for request in order:
        for index, member in enumerate(request.members):
            node = choose(request, nodes, driver_node, request.count - index)
            if node is None:
                return places, request
            node.take(request)
            places[member] = node
    return places, None


def _too_small(
    requests: Sequence[ResourceRequest], nodes: Sequence[Node], missing: ResourceRequest
) -> ClusterTooSmall:
    """Put into an error what is requested, what is free, and what to change."""
    asking = [request for request in requests if request.gpus] or [missing]
    roles = ", ".join(f"{request.role} {request.count} x {request.gpus:g}" for request in asking)
    held = [f"{node.address} {node.free:g} of {node.gpus:g}" for node in nodes if node.gpus]
    settings = list(dict.fromkeys(setting for request in asking for setting in request.settings))
    *most, last = settings or [""]
    named = f"{', '.join(most)} or {last}" if most else last
    change = f"lower {named}, or add nodes" if named else "add nodes"
    return ClusterTooSmall(
        f"asked are {sum(request.count * request.gpus for request in asking):g} GPUs ({roles}),"
        f" free are {sum(node.free for node in nodes):g} ({', '.join(held) or 'no node'}): no node"
        f" has {missing.gpus:g} left for the next {missing.role}; {change}"
    )
