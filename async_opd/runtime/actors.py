"""Plain role classes as Ray actors, behind the ports. Only this file, `nodes` and `jobs` import
ray."""

import asyncio
import gc
import inspect
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import ray.util.metrics
from ray import exceptions
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tokenizers import Tokenizer

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import refuse_without_gpus, teacher_section
from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed, ConfigError
from async_opd.core.events import Tell
from async_opd.core.ports import Ref
from async_opd.core.process_wide import no_garbage_collection
from async_opd.core.roles import Roles
from async_opd.runtime.actor_specs import Casting, Part
from async_opd.runtime.nodes import (
    alive_nodes,
    driver_node,
    start_ray,
    taken_over,
    wait_for_resources,
)
from async_opd.runtime.placement import RANK, Node, ResourceRequest, choose, resource_requests
from async_opd.runtime.remote_roles import GeneratorProxy, LearnerProxy, TeacherProxy, VerifierProxy

GONE = (RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError, OutOfMemoryError)
CALLS_AT_ONCE = 10_000  # an async actor refuses nothing below this; the slots bound what there is
Member = GeneratorProxy | TeacherProxy | VerifierProxy


class _Host:
    """The actor: builds one role in its own process and forwards calls to it."""

    def __init__(self, part: Part, gpus: float):
        """`gpus` below 1 is the share of the card's memory that PyTorch may take here; an engine of
        vLLM's, which runs in a process of its own, is told the same by its
        gpu_memory_utilization."""
        module, name = part.target.split(":")
        if 0 < gpus < 1 and not part.engine:
            import torch

            if torch.cuda.is_available():
                torch.cuda.set_per_process_memory_fraction(gpus)
        with no_garbage_collection():
            self._role = getattr(import_module(module), name)(*part.args, **part.settings)
        gc.collect()
        # what was imported and built is not garbage: a full collection need not look through it
        gc.freeze()

    async def call(self, method: str, *args: Any) -> Any:
        result = getattr(self._role, method)(*args)
        return await result if inspect.isawaitable(result) else result

    async def each(self, method: str, *args: Any) -> tuple[Any, ...]:
        """`call` for each of `args`, whose results stay references: the caller awaits what comes
        before them, the error of each, or None."""
        found = await asyncio.gather(
            *(self.call(method, arg) for arg in args), return_exceptions=True
        )
        errors = [result if isinstance(result, Exception) else None for result in found]
        named = [
            e and (e if isinstance(e, AsyncOpdError) else CallFailed(f"{method}: {e!r}"))
            for e in errors
        ]
        return named, *(
            None if error else result for error, result in zip(named, found, strict=True)
        )

    async def check_health(self) -> None:
        """Answered by a process that lives; a role with an engine of its own looks at it too."""
        if check := getattr(self._role, "check_health", None):
            await check()

    async def address(self) -> str:
        """This node's address."""
        return ray.util.get_node_ip_address()

    async def place(self) -> str:
        """This node's address and the GPUs that are this actor's."""
        gpus = ", ".join(map(str, ray.get_gpu_ids()))
        return f"node {ray.util.get_node_ip_address()}{gpus and ', GPU '}{gpus}"

    async def sees(self, file: str) -> bool:
        """Whether a file of the driver's is here, too."""
        return Path(file).exists()


class _Actor:
    """A handle with a name and bounded calls."""

    def __init__(self, name: str, part: Part, ask: ResourceRequest, node: str | None):
        """On that node, or where Ray finds room once there is some."""
        self.name = name
        self.ask = ask
        self.node = node
        self.killed = False
        # of the process, in `ps` and Ray's tools
        title = name.split()[0].split(".")[0].removesuffix("s").capitalize()
        role = type(title, (_Host,), {})
        options = {"num_cpus": 0, "num_gpus": ask.gpus, "max_concurrency": CALLS_AT_ONCE}
        # a byte: Ray puts what asks for nothing on any node, whatever is said of nodes
        options["memory"] = 1
        if node is not None:  # softly: a node that dies meanwhile keeps nobody waiting
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        self.handle = ray.remote(role).options(**options).remote(part, ask.gpus)

    async def call(self, timeout_s: float, method: str, *args: Any) -> Any:
        return await self.result(self.handle.call.remote(method, *args), timeout_s, method)

    async def spread(
        self, timeout_s: float, count: int, how: str, method: str, *args: Any
    ) -> tuple[Any, list[Ref]]:
        """A call with 1 + `count` results: the first awaited, the others left where they are."""
        first, *rest = (
            getattr(self.handle, how).options(num_returns=1 + count).remote(method, *args)
        )
        return await self.result(first, timeout_s, method), rest

    async def check_health(self, timeout_s: float) -> None:
        await self.result(self.handle.check_health.remote(), timeout_s, "sign of life")

    def kill(self) -> None:
        self.killed = True
        ray.kill(self.handle)

    async def address(self, timeout_s: float) -> str:
        """Of the node where the actor runs; answered once its role is built."""
        return await self.result(self.handle.address.remote(), timeout_s, "start")

    async def sees(self, file: str, timeout_s: float) -> bool:
        return await self.result(
            self.handle.sees.remote(file), timeout_s, "look at the run directory"
        )

    async def result(self, ref: Ref, timeout_s: float, what: str) -> Any:
        """Await a call's result. Raises the role's own named error, ActorLost, or TimedOut."""
        try:
            return await bounded(_as_future(ref), timeout_s, f"{self.name}, {what}")
        except GONE as e:
            lines = str(e).partition("Some common causes")[0].strip().splitlines() or [
                type(e).__name__
            ]
            # a failed constructor ends with its own error
            why = " … ".join(dict.fromkeys((lines[0], lines[-1])))
            raise ActorLost(f"{self.name} died during {what}: {why}") from None
        except RayTaskError as e:
            if isinstance(e.cause, AsyncOpdError):
                raise e.cause from None
            raise CallFailed(f"{self.name}, {what}: {type(e.cause).__name__}: {e.cause}") from e
        except ObjectLostError as e:  # what it was to work on went with a node
            raise CallFailed(f"{self.name}, {what}: {e}") from None


async def _as_future(ref: Ref) -> Any:
    return await ref


class Cluster:
    """Every actor of one run, started side by side on the cluster that `start_ray` finds, or makes
    for this run.

    A context manager: on leaving, however that comes about, its actors are killed, and what
    `start_ray` has begun is ended.
    """

    def __init__(
        self,
        config: Config,
        *,
        eos_ids: list[int],
        tokenizer: Tokenizer,
        first_seed: int | None = None,
        tell: Tell = lambda what, who, why: None,
    ):
        """`first_seed`: of the engines, the config's where it is absent. `tell` is told where each
        member lives."""
        self._config = config
        self._eos_ids = eos_ids
        self._tell = tell
        seed = config.run.seed if first_seed is None else first_seed
        self._casting = Casting(config, eos_ids=eos_ids, tokenizer=tokenizer, first_seed=seed)
        self._actors: list[_Actor] = []
        # On a card that is shared one starts after the other: vLLM measures what is free while it
        # starts.
        self._turn = asyncio.Lock() if config.run.share_gpu else nullcontext()

    def __enter__(self) -> "Cluster":
        with ExitStack() as leaving:
            start_ray()
            leaving.enter_context(taken_over())
            self._gpus = bool(ray.cluster_resources().get("GPU"))
            self._asked = {ask.role: ask for ask in resource_requests(self._config, self._gpus)}
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._leaving.callback(actor.kill)
        self._leaving.close()

    async def roles(self) -> Roles:
        """Start the roles of a training run; at most `timeout.start_s`, once there is room for
        them."""
        config = self._config
        if not self._gpus:
            needs_gpus = config.run.share_gpu, config.sync.backend
            refuse_without_gpus(config.scorers, config.rollout, config.objective, *needs_gpus)
        nodes = await self._room(self._asked.values())
        pools = [ask for ask in self._asked.values() if ask.role != RANK]
        learner, *found = await asyncio.gather(
            self._learner(nodes), *(self._pool(ask, nodes) for ask in pools)
        )
        await self._share_files()
        members = {ask.role: ports for ask, ports in zip(pools, found, strict=True)}
        return Roles(
            generators=members["generator"],
            teacher_generators=members.get("teacher-generator", ()),
            teachers={name: members[teacher_section(name)] for name in config.named_teachers},
            references=members.get("reference", ()),
            verifier=members["verifier"][0],
            learner=learner,
            spawn=self._spawn,
        )

    async def evaluators(self) -> tuple[list[GeneratorProxy], list[VerifierProxy]]:
        """Start only what an evaluation needs."""
        asked = [self._asked[role] for role in ("generator", "verifier")]
        nodes = await self._room(asked)
        return await asyncio.gather(*(self._pool(ask, nodes) for ask in asked))

    async def _room(self, asked: Iterable[ResourceRequest]) -> Mapping[str, Node]:
        return await wait_for_resources(list(asked), self._config.timeout.nodes_s, self._tell)

    async def _pool(self, ask: ResourceRequest, nodes: Mapping[str, Node]) -> list[Member]:
        """Every member that `ask` is for."""
        return await asyncio.gather(
            *(self._spawn(ask.role, index, nodes) for index in range(ask.count))
        )

    async def _learner(self, nodes: Mapping[str, Node]) -> LearnerProxy:
        """Every rank, in one process group."""
        start_s, ask = self._config.timeout.start_s, self._asked[RANK]
        async with self._turn:
            parts = map(self._casting.learner_rank, range(ask.count))
            ranks = [
                self._make(name, part, nodes[name])
                for name, part in zip(ask.members, parts, strict=True)
            ]
            address = await ranks[0].address(start_s)
            rendezvous = await ranks[0].call(start_s, "listen", address)
            await asyncio.gather(*(rank.call(start_s, "start", rendezvous) for rank in ranks))
        await asyncio.gather(*map(self._settled, ranks))
        return LearnerProxy(ranks, address, self._config)

    async def _spawn(
        self, pool: str, index: int, nodes: Mapping[str, Node] | None = None
    ) -> Member:
        """A new member of `pool`, ready; at most `timeout.start_s`. Where `nodes` says, or where
        there is room now."""
        start_s = self._config.timeout.start_s
        name = f"{pool} {index}"
        ask = self._asked[pool]
        async with self._turn:
            lost = next(
                (actor.node or "" for actor in reversed(self._actors) if actor.name == name), ""
            )
            node = (
                nodes[name]
                if nodes
                else choose(ask, alive_nodes(self._members()), driver_node(), lost=lost)
            )
            actor = self._make(name, self._casting.member(pool, index), node)
            with ExitStack() as unless:
                unless.callback(actor.kill)
                if starts := pool in ("generator", "teacher-generator", "verifier"):
                    await actor.call(start_s, "start")
                await self._settled(actor)
                unless.pop_all()
        if starts:
            return (VerifierProxy if pool == "verifier" else GeneratorProxy)(actor, self._config)
        return TeacherProxy(actor, self._config, self._eos_ids)

    async def _settled(self, actor: _Actor) -> None:
        """Once its role is built, tell where it lives."""
        start_s = self._config.timeout.start_s
        self._tell(
            "placed", actor.name, await actor.result(actor.handle.place.remote(), start_s, "start")
        )

    def _make(self, name: str, part: Part, node: Node | None) -> _Actor:
        self._actors.append(
            _Actor(name, part, self._asked[name.rpartition(" ")[0]], node and node.id)
        )
        return self._actors[-1]

    def _members(self) -> list[tuple[str | None, ResourceRequest]]:
        """The node of each that lives."""
        return [(actor.node, actor.ask) for actor in self._actors if not actor.killed]

    async def _share_files(self) -> None:
        """Raise ConfigError where one that writes to the run directory, or reads there, has another
        disk."""
        config = self._config
        moving = (
            teacher_section(name)
            for name, teacher in config.named_teachers.items()
            if teacher.update != "frozen"
        )
        roles = {RANK, *moving}
        far = [
            actor
            for actor in self._actors
            if actor.ask.role in roles and actor.node != driver_node()
        ]
        if not far:
            return
        with tempfile.NamedTemporaryFile(
            dir=Path(config.run.dir).resolve(), prefix=".seen-"
        ) as file:
            seen = await asyncio.gather(
                *(actor.sees(file.name, config.timeout.start_s) for actor in far)
            )
        blind = [actor.name for actor, sees in zip(far, seen, strict=True) if not sees]
        if blind:
            shared = (
                "must lie on a disk that every node sees, or all of them must fit on the driver's"
                " node"
            )
            raise ConfigError(
                f"run.dir = {config.run.dir!r}: not seen by {', '.join(blind)}; it {shared}"
            )
