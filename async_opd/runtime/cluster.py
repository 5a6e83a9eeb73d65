"""Every actor of one run, started side by side on a cluster."""

import asyncio
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from tokenizers import Tokenizer

from async_opd.config.precision import with_dtypes
from async_opd.config.schema import Config
from async_opd.config.teacher_rules import refuse_without_gpus, teacher_section
from async_opd.core.aio import together
from async_opd.core.aside import aside
from async_opd.core.errors import AsyncOpdError, HeadLost, SystemFailed, first_line
from async_opd.core.events import EventSink
from async_opd.core.ports import Generator, Teacher, Verifier
from async_opd.core.roles import Roles
from async_opd.core.run_dir import LOGS
from async_opd.core.vocabulary import Tokens
from async_opd.runtime.actor_log import ActorLog
from async_opd.runtime.actor_specs import ActorSpec, ActorSpecs
from async_opd.runtime.actors import RemoteActor
from async_opd.runtime.nodes import (
    alive_nodes,
    dead_head,
    driver_node,
    head_lost,
    kill_own_head,
    refuse_silent,
    start_ray,
    taken_over,
    wait_for_resources,
)
from async_opd.runtime.placement import RANK, Node, ResourceRequest, choose, resource_requests
from async_opd.runtime.remote_learner import RemoteLearner
from async_opd.runtime.remote_role import RemoteRole
from async_opd.runtime.servers import look_at
from async_opd.runtime.shared_disk import check_shared

PORTS = {"generator": Generator, "teacher-generator": Generator, "verifier": Verifier}


class Cluster:
    """Every actor of one run, started side by side on the cluster that `start_ray` finds, or makes
    for this run.

    A context manager: on leaving, however that comes about, its actors are killed, and what
    `start_ray` has begun is ended. Where Ray's head is lost meanwhile, the task that works inside
    is cancelled, and leaving raises HeadLost.
    """

    def __init__(
        self,
        config: Config,
        *,
        tokens: Tokens,
        tokenizer: Tokenizer,
        first_seed: int | None = None,
        emit: EventSink = lambda what, who, why: None,
    ):
        """`first_seed`: of the engines, the config's where it is absent. `emit` hears where each
        member lives."""
        self.config = config  # inside, with the dtypes that absent ones mean there
        self._emit = emit
        seed = config.run.seed if first_seed is None else first_seed
        self._timeouts = _timeouts(config)
        self._make_specs = partial(ActorSpecs, tokens=tokens, tokenizer=tokenizer, first_seed=seed)
        self._actors: list[RemoteActor] = []
        self._lost = ""  # what is wrong with Ray's head
        self._inside: asyncio.Task[Any] | None = None  # the task that works with its actors …
        self._watching: asyncio.Task[None] | None = None  # … and the one that cancels it then
        # On a card that is shared one starts after the other: vLLM measures what is free while it
        # starts.
        self._turn = asyncio.Lock() if config.run.share_gpu else nullcontext()

    def __enter__(self) -> "Cluster":
        with ExitStack() as leaving:
            refuse_silent()
            start_ray()
            leaving.enter_context(taken_over())
            try:
                self.gpus = bool(ray.cluster_resources().get("GPU"))
            except (RayError, OSError) as e:
                raise SystemFailed(f"Ray, its resources: {first_line(e)}") from e
            self.config = with_dtypes(self.config, gpus=self.gpus)
            self._specs = self._make_specs(self.config)
            self._requests = {
                request.role: request for request in resource_requests(self.config, self.gpus)
            }
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._watching:
            self._watching.cancel()
        for actor in self._actors:
            self._leaving.callback(actor.kill)
        if lost := self._lost or dead_head():
            kill_own_head()  # nothing of it can be asked to end
        self._leaving.close()
        if not lost:
            return
        if self._lost and self._inside and self._inside.uncancel():
            return  # interrupted by others, too
        if error and (isinstance(error, AsyncOpdError) or self._lost):
            head = HeadLost(
                f"Ray's head: {lost}; `async-opd train --resume` goes on from what is saved"
            )
            for note in getattr(error, "__notes__", ()):
                head.add_note(note)
            raise head from error

    async def _watch(self) -> None:
        timeout = self.config.timeout
        self._lost = await head_lost(timeout.health_s, timeout.stall_s)
        if self._inside:
            self._inside.cancel()

    async def roles(self) -> Roles:
        """Start the roles of a training run; at most `timeout.start_s`, once there is room for
        them."""
        config = self.config
        if not self.gpus:
            needs_gpus = config.run.share_gpu, config.sync.backend
            refuse_without_gpus(config.scorers, config.rollout, config.objective, *needs_gpus)
        nodes = await self._room(self._requests.values())
        pools = [request for request in self._requests.values() if request.role != RANK]
        # one that cannot start ends the others, while Ray is there to end them by
        starting = together(*(self._pool(request, nodes) for request in pools))
        learner, replicas = await together(self._learner(nodes), starting)
        await check_shared(config, self._actors)
        members = {request.role: ports for request, ports in zip(pools, replicas, strict=True)}
        return Roles(
            generators=members["generator"],
            teacher_generators=members.get("teacher-generator", ()),
            teachers={
                name: members[section]
                for name in config.named_teachers
                if (section := teacher_section(name)) in members
            },
            references=members.get("reference", ()),
            verifier=members["verifier"][0],
            learner=learner,
            exact=in_float32(config),
            spawn=self._spawn,
            look=partial(look_at, self._specs),
        )

    async def evaluators(self) -> list[list[Any]]:
        """Start only what an evaluation needs."""
        requests = [self._requests[role] for role in ("generator", "verifier")]
        nodes = await self._room(requests)
        generators, verifiers = (self._pool(request, nodes) for request in requests)
        return await together(generators, verifiers)

    async def _room(self, requests: Iterable[ResourceRequest]) -> Mapping[str, Node]:
        """The node of each member, once there is room; from now on Ray's head is watched."""
        self._inside = asyncio.current_task()
        self._watching = asyncio.create_task(self._watch())
        return await wait_for_resources(list(requests), self.config.timeout.nodes_s, self._emit)

    async def _pool(self, request: ResourceRequest, nodes: Mapping[str, Node]) -> list[Any]:
        """Every member that `request` is for, as its port; None for one that asks a server which
        is away: all of them were looked at when the run began, and its pool has patience."""
        which = request.urls or range(request.count)
        starting = [self._spawn(request.role, each, nodes) for each in which]
        return await together(*(map(_or_none, starting) if request.urls else starting))

    async def _learner(self, nodes: Mapping[str, Node]) -> Any:
        """Every rank, in one process group, as the learner's port."""
        start_s, request = self.config.timeout.start_s, self._requests[RANK]
        async with self._turn:
            ranks = [
                await self._make(name, self._specs.learner_rank(rank), nodes[name])
                for rank, name in enumerate(request.members)
            ]
            address = await ranks[0].ask_host(start_s, "address", what="start")
            rendezvous = await ranks[0].call(start_s, "listen", address)
            joining = (rank.call(start_s, "start", rendezvous) for rank in ranks)
            width, *_ = await together(*joining)
        await asyncio.gather(*map(self._settled, ranks))
        return RemoteLearner(ranks, address, width, self.config, self._timeouts)

    async def _spawn(
        self, pool: str, which: int | str, nodes: Mapping[str, Node] | None = None
    ) -> Any:
        """A new member of `pool`, ready; at most `timeout.start_s`. Where `nodes` says, or where
        there is room now."""
        start_s = self.config.timeout.start_s
        name = f"{pool} {which}"
        request = self._requests[pool]
        async with self._turn:
            lost = next(
                (actor.node or "" for actor in reversed(self._actors) if actor.name == name), ""
            )
            node = (
                nodes[name]
                if nodes
                else choose(request, await alive_nodes(self._members()), driver_node(), lost=lost)
            )
            actor = await self._make(name, self._specs.member(pool, which), node)
            with ExitStack() as unless:
                unless.callback(actor.kill)
                await actor.ask_host(start_s, "start")
                await self._settled(actor)
                unless.pop_all()
        return RemoteRole(actor, PORTS.get(pool, Teacher), self._timeouts)

    async def _settled(self, actor: RemoteActor) -> None:
        """Once its role is built, tell where it lives."""
        place = await actor.ask_host(self.config.timeout.start_s, "place", what="start")
        self._emit("placed", actor.name, place)

    async def _make(self, name: str, spec: ActorSpec, node: Node | None) -> RemoteActor:
        request = self._requests[name.rpartition(" ")[0]]
        folder, start_s = Path(self.config.run.dir).absolute() / LOGS, self.config.timeout.start_s
        log = await aside(start_s, f"log of {name}", ActorLog.begun, folder, name)
        self._actors.append(RemoteActor(name, spec, request, node.id if node else None, log))
        return self._actors[-1]

    def _members(self) -> list[tuple[str | None, ResourceRequest]]:
        """The node of each that lives."""
        return [(actor.node, actor.request) for actor in self._actors if not actor.killed]


async def _or_none(starting: Coroutine[Any, Any, Any]) -> Any:
    """What `starting` gives, None where it ends by a named error."""
    try:
        return await starting
    except AsyncOpdError:
        return None


def in_float32(config: Config) -> bool:
    """Tell whether learner and generators compute in float32, and keep their KV in it; `config` is
    `with_dtypes`."""
    dtypes = {config.learner.dtype, config.rollout.dtype}
    cached = config.rollout.engine.get("kv_cache_dtype", "auto")
    return dtypes == {"float32"} and cached in ("auto", "float32")


def _timeouts(config: Config) -> dict[str, float]:
    """Seconds by what `ports.remote` calls them."""
    return {
        "generate": config.timeout.generate_s,
        "score": config.timeout.score_s,
        "step": config.timeout.step_s,
        "stall": config.timeout.stall_s,
        "sync": config.sync.timeout_s,
        "collective": 2 * config.sync.timeout_s,
    }
