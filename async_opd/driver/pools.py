"""Every role of a run as pools whose members come and go."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import section
from async_opd.core.errors import ActorLost
from async_opd.core.events import Tell
from async_opd.core.ports import Generator, Teacher, Verifier
from async_opd.core.roles import Roles
from async_opd.driver.replica_pool import Pool, Seat
from async_opd.driver.timed import TimedGenerator, TimedTeacher, TimedVerifier
from async_opd.telemetry.metrics import Meter
from async_opd.telemetry.spans import ActorTime


class Crew:
    """The pools, each member accounting for its time. A self-teacher has no replacement: its
    weights are its own."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        meter: Meter,
        tell: Tell,
        welcome: Callable[[Seat], Awaitable[None]],
    ):
        """`welcome` brings a new generator into the weight group before it serves."""
        self._roles = roles
        self._meter = meter
        self._tell = tell
        self._timeout = config.timeout
        self._idle = "blocked"  # what a generator without a request is
        self.generators: Pool[Generator] = self._pool(
            "generator",
            "generators",
            roles.generators,
            lambda port, time: TimedGenerator(port, time, self._idle),
            welcome=welcome,
        )
        self.teachers: dict[str, Pool[Teacher]] = {
            name: self._scorers(
                section(name), "teachers", pool, config.named_teachers[name].update == "frozen"
            )
            for name, pool in roles.teachers.items()
        }
        self.references = (
            self._scorers("reference", "reference", roles.references) if roles.references else None
        )
        self.verifier: Pool[Verifier] = self._pool(
            "verifier", "verifier", [roles.verifier], TimedVerifier
        )
        self.teacher_generators: Pool[Generator] = self._pool(
            "teacher-generator", "teacher_generators", roles.teacher_generators, TimedGenerator
        )

    def __iter__(self) -> Iterator[Pool]:
        pools = (
            self.generators,
            *self.teachers.values(),
            self.references,
            self.verifier,
            self.teacher_generators,
        )
        return (pool for pool in pools if pool)

    @property
    def scalable(self) -> dict[str, Pool[Any]]:
        """Pools whose size may be changed, by the name a user has for them. A self-teacher's is
        none."""
        named = {section(name): pool for name, pool in self.teachers.items()}
        named |= {"generators": self.generators, "reference": self.references}
        return {name: pool for name, pool in named.items() if pool and pool.can_grow}

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """From now on the lost are noticed and replaced."""
        for pool in self:
            pool.start(tasks, every_s=self._timeout.health_s, stall_s=self._timeout.stall_s)

    def stop(self) -> None:
        """No more of that: training is over."""
        for pool in self:
            pool.stop()

    def no_prompt_is_left(self) -> None:
        """Generators that idle do so from now on because there is nothing to hand out."""
        if self._idle != "starved":
            self._idle = "starved"
            for seat in self.generators.serving:
                seat.port.no_prompt_is_left()

    def _scorers(
        self, name: str, role: str, replicas: Sequence[Teacher], replaced: bool = True
    ) -> Pool[Teacher]:
        """A late teacher is not given up: it may have been sent more than it can score."""
        return self._pool(name, role, replicas, TimedTeacher, replaced, lost_by=(ActorLost,))

    def _pool(
        self,
        name: str,
        role: str,
        ports: Sequence,
        timed: Callable,
        replaced: bool = True,
        **settings: Any,
    ) -> Pool:
        times: dict[int, ActorTime] = {}  # of each seat, whoever holds it

        def wrap(index: int, port: Any) -> Any:
            if index not in times:
                times[index] = self._meter.actor(role, f"{name} {index}")
            return timed(port, times[index])

        spawn = self._roles.spawn
        start = (lambda index: spawn(name, index)) if spawn and replaced else None
        return Pool(name, ports, spawn=start, wrap=wrap, tell=self._tell, **settings)
