"""Every role of a run as pools whose members come and go."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import teacher_section
from async_opd.core.events import EventSink
from async_opd.core.ports import Generator, Teacher, Verifier
from async_opd.core.precision import dtype_on
from async_opd.core.roles import Roles
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import M, ReplicaPool, Servers
from async_opd.driver.scorer_probe import ScorerProbe
from async_opd.roles.teacher.config import ScorerConfig
from async_opd.telemetry.metrics import Meter
from async_opd.telemetry.spans import ActorTime


class Pools:
    """The pools, each member accounting for its time. A self-teacher has no replacement: its
    weights are its own."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        meter: Meter,
        emit: EventSink,
        welcome: Callable[[Replica[Generator]], Awaitable[None]],
    ):
        """`welcome` brings a new generator into the weight group before it serves."""
        self._roles = roles
        self._meter = meter
        self._emit = emit
        self.look = roles.look
        self.scorers = config.scorers
        self._timeout = config.timeout
        self._every = config.sync.parity_every_steps
        self.generators: ReplicaPool[Generator] = self._pool(
            "generator", "generators", roles.generators, idle="blocked", welcome=welcome
        )
        self._probes: list[tuple[ScorerProbe, ReplicaPool[Teacher]]] = []
        self.teachers = {
            name: self._scorers(
                teacher_section(name),
                "teachers",
                replicas,
                config.named_teachers[name],
                config.named_teachers[name].update == "frozen",
            )
            for name, replicas in roles.teachers.items()
        }
        self.references = (
            self._scorers("reference", "reference", roles.references, config.measured_against)
            if roles.references
            else None
        )
        # self-teachers by the number of steps between two of their updates
        self.moving: dict[int, list[ReplicaPool[Teacher]]] = {}
        for name, teacher in config.named_teachers.items():
            if teacher.update != "frozen":
                self.moving.setdefault(teacher.update_every_steps, []).append(self.teachers[name])
        self.verifier: ReplicaPool[Verifier] = self._pool("verifier", "verifier", [roles.verifier])
        self.teacher_generators: ReplicaPool[Generator] = self._pool(
            "teacher-generator", "teacher_generators", roles.teacher_generators
        )

    def __iter__(self) -> Iterator[ReplicaPool[Any]]:
        yield self.generators
        yield from self.teachers.values()
        if self.references:
            yield self.references
        yield self.verifier
        yield self.teacher_generators

    @property
    def scalable(self) -> dict[str, ReplicaPool[Any]]:
        """Pools whose size may be changed, by the name a user has for them. A self-teacher's is
        none."""
        named: dict[str, ReplicaPool[Any]] = {
            teacher_section(name): pool for name, pool in self.teachers.items()
        }
        named["generators"] = self.generators
        if self.references:
            named["reference"] = self.references
        return {name: pool for name, pool in named.items() if pool.can_grow}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """From now on the lost are noticed and replaced."""
        for probe, _ in self._probes:
            probe.start(tasks)
        for pool in self:
            pool.start(tasks, every_s=self._timeout.health_s)

    async def compare(self) -> None:
        """Hold the replicas of each scorer against one another. Raises ScorerDiffers."""
        await asyncio.gather(*(probe.compare(pool) for probe, pool in self._probes))

    async def compare_beside(self, version: int) -> None:
        """The same, as often as generators are probed; wait only for those that follow the student,
        while it stands still."""
        if version % self._every:
            return
        for probe, pool in self._probes:
            if not probe.moving:
                probe.begin(pool)
        moving = [(probe, pool) for probe, pool in self._probes if probe.moving]
        await asyncio.gather(*(probe.compare(pool) for probe, pool in moving))

    def stop(self) -> None:
        """No more of that: training is over."""
        for pool in self:
            pool.stop()
        for probe, _ in self._probes:
            probe.stop()

    def _scorers(
        self,
        name: str,
        role: str,
        replicas: Sequence[Teacher | None],
        scorer: ScorerConfig,
        replaced: bool = True,
    ) -> ReplicaPool[Teacher]:
        # what is absent still is a CPU's: on GPUs `with_dtypes` has written it down
        dtype, servers = dtype_on(False, scorer.dtype), None
        if scorer.backend == "server":
            dtype = scorer.dtype or "bfloat16"
            servers = Servers(tuple(map(str, scorer.members)), self._timeout.start_s)
        probe = ScorerProbe(dtype, moving=not replaced, served=servers is not None)
        pool = self._pool(
            name, role, replicas, replaced=replaced, welcome=probe.welcome, servers=servers
        )
        self._probes.append((probe, pool))
        return pool

    def _pool(
        self,
        name: str,
        role: str,
        ports: Sequence[M | None],
        *,
        idle: str = "starved",
        replaced: bool = True,
        welcome: Callable[[Replica[M]], Awaitable[None]] | None = None,
        servers: Servers | None = None,
    ) -> ReplicaPool[M]:
        times: dict[str, ActorTime] = {}  # of each place, whoever holds it

        def actor_time(member: str) -> ActorTime:
            if member not in times:
                times[member] = self._meter.actor(role, member)
            return times[member]

        spawn = self._roles.spawn
        return ReplicaPool(
            name,
            ports,
            spawn=(lambda which: spawn(name, which)) if spawn and replaced else None,
            welcome=welcome,
            actor_time=actor_time,
            idle=idle,
            emit=self._emit,
            servers=servers,
        )
