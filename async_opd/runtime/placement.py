"""Where the members of a run live: what each role asks for, and the node that each of its members
goes to.

A member is one actor, and the GPUs of an actor are on one node: a tensor-parallel engine never
leaves it. Learner ranks are packed, on the driver's node where they fit; the members of any other
role are spread, so that a node that dies takes few of each. CPUs are not reserved: what has no GPU
runs on a laptop of two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import shared_with_learner
from async_opd.core.errors import ClusterTooSmall

RANK = "learner rank"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a role asks for."""

    role: str  # a pool's by its name: "generator", "teachers.NAME"
    count: int  # members
    # of each member, on one node; below 1, its share of a card and of the card's memory
    gpus: float
    settings: tuple[str, ...] = ()  # that ask for it
    packed: bool = False  # on as few nodes as can be; else on as many

    @property
    def members(self) -> list[str]:
        """Their names."""
        return [f"{self.role} {index}" for index in range(self.count)]


@dataclass(kw_only=True)
class Node:
    """A node of the cluster, and what lives on it."""

    id: str
    address: str
    cpus: float
    gpus: float
    free: float  # of `gpus`
    members: list[Ask] = field(default_factory=list)  # of this run: for each the ask of its role

    def take(self, ask: Ask) -> None:
        """One more member."""
        self.members.append(ask)
        self.free = round(self.free - ask.gpus, 4)


def asks(config: Config, gpus: bool) -> list[Ask]:
    """What `config` asks for on a cluster with GPUs, or on one without: the learner first, the
    verifier last."""
    share, found = config.run.share_gpu, []
    for role, at, count, setting, engine in config.engines:
        size = engine.tensor_parallel_size
        settings = (setting, f"{at}.tensor_parallel_size") if size > 1 else (setting,)
        own = engine.gpu_memory_utilization if share else float(size)
        found.append(
            Ask(role=role, count=count, gpus=own if gpus else 0.0, settings=settings, packed=share)
        )
    own = shared_with_learner(config.engines) if share else 1.0
    ranks = config.learner.ranks
    learner = Ask(
        role=RANK, count=ranks, gpus=own if gpus else 0.0, settings=("learner.ranks",), packed=True
    )
    return [learner, *found, Ask(role="verifier", count=1, gpus=0.0)]


def place(asked: Sequence[Ask], nodes: Sequence[Node], home: str = "") -> dict[str, Node]:
    """The node of each member by the member's name; `home` is the driver's. Raises ClusterTooSmall
    with the numbers."""
    largest_first = sorted(asked, key=lambda ask: -ask.gpus)
    # the learner may take the place of an engine that fits nowhere else
    for order in (asked, largest_first):
        found, missing = _placed(order, nodes, home)
        if missing is None:
            return found
    raise _too_small(asked, nodes, missing)


def place_on_alike(
    asked: Sequence[Ask], gpus: int, count: int | None = None
) -> dict[str, list[str]]:
    """The members on each of `count` empty nodes of that many GPUs, or of as few as hold them.
    Raises ClusterTooSmall."""
    # a node for each member
    enough = sum(ask.count for ask in asked) if all(ask.gpus <= gpus for ask in asked) else 1
    for size in range(count or 1, (count or enough) + 1):
        nodes = [
            Node(id=f"{at}", address=f"node {at}", cpus=1, gpus=gpus, free=gpus)
            for at in range(size)
        ]
        try:
            found = place(asked, nodes, nodes[0].id)
        except ClusterTooSmall:
            if size == (count or enough):
                raise
        else:
            return {
                n.address: [member for member, at in found.items() if at.id == n.id] for n in nodes
            }


def choose(
    ask: Ask, nodes: Sequence[Node], home: str = "", left: int = 1, lost: str = ""
) -> Node | None:
    """The node for one more member, of `left` that are to come; None where there is no room. One in
    place of a member that was `lost` with its node should not go there: Ray takes a dead node for a
    living one for some time."""
    # a node without CPUs is kept free of everything else
    for_all = [node for node in nodes if node.cpus] or nodes
    rooms = [node for node in nodes if node.free >= ask.gpus] if ask.gpus else for_all

    def packed(node: Node) -> tuple:
        beside, fits = sum(other.packed for other in node.members), node.free >= left * ask.gpus
        return -beside, not fits, node.id != home, node.free if fits else -node.free

    def spread(node: Node) -> tuple:
        alike = sum(other.role == ask.role for other in node.members)
        return node.id == lost, alike, len(node.members), node.id == home

    return min(rooms, key=packed if ask.packed else spread, default=None)


def _placed(
    order: Sequence[Ask], nodes: Sequence[Node], home: str
) -> tuple[dict[str, Node], Ask | None]:
    """The members that find a node, and the ask of the first that finds none."""
    nodes, found = [replace(node, members=list(node.members)) for node in nodes], {}
    for ask in order:
        for at, member in enumerate(ask.members):
            node = choose(ask, nodes, home, ask.count - at)
            if node is None:
                return found, ask
            node.take(ask)
            found[member] = node
    return found, None


def _too_small(asked: Sequence[Ask], nodes: Sequence[Node], missing: Ask) -> ClusterTooSmall:
    asking = [ask for ask in asked if ask.gpus] or [missing]
    roles = ", ".join(f"{ask.role} {ask.count} x {ask.gpus:g}" for ask in asking)
    held = (
        ", ".join(f"{node.address} {node.free:g} of {node.gpus:g}" for node in nodes if node.gpus)
        or "no node"
    )
    settings = list(dict.fromkeys(setting for ask in asking for setting in ask.settings))
    change = "add nodes"
    if settings:
        *most, last = settings
        change = (
            f"lower {', '.join(most)} or {last}, or add nodes"
            if most
            else f"lower {last}, or add nodes"
        )
    return ClusterTooSmall(
        f"asked are {sum(ask.count * ask.gpus for ask in asking):g} GPUs ({roles}), free are"
        f" {sum(node.free for node in nodes):g} ({held}): no node has {missing.gpus:g} left for the"
        f" next {missing.role}; {change}"
    )
