"""Weights from the learner to every generator, and when it is probed that they arrived."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, Self

from async_opd.config.schema import Config
from async_opd.core.errors import ActorLost, SyncFailed, TimedOut
from async_opd.core.events import EventSink
from async_opd.core.ports import Generator, Learner
from async_opd.core.weights import WeightLayout
from async_opd.driver.parity import Gap, HalfPrecision, Parity
from async_opd.driver.parity_probe import ParityProbe
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool

MAX_BROADCASTS = 3  # of one version that fail though nobody is lost


class WeightPublisher:
    """One weight group over all generators, formed anew whenever its members change. An update
    reaches every member that lives, or fails by name."""

    def __init__(
        self,
        learner: Replica[Learner],
        generators: ReplicaPool[Generator],
        *,
        parity_every: int,
        tolerance: float,
        half: HalfPrecision | None = None,
        max_age: int | None = None,
        waits: bool = True,
        emit: EventSink = lambda what, who, why: None,
    ):
        """`tolerance` and `half` are as `Parity` has them. `max_age`: a group in flight whose
        oldest token is more versions behind is cut off by the update. `waits`: generators run on
        once they have what is admitted behind an update, so a synchronous run repeats itself
        exactly; else they run on first."""
        self._learner, self._pool = learner, generators
        self._parity_every = parity_every
        self.probe = ParityProbe(learner, generators, Parity(tolerance, half, emit))
        self._probed = -1  # the last version of which all were
        self._max_age = max_age
        self._waits = waits
        self._group: list[Replica[Generator]] = []
        self._layout = WeightLayout((), (), ())
        self._sent: dict[int, int] = {}  # calls of each generator when its last update ended

    @classmethod
    def of(
        cls,
        config: Config,
        learner: Replica[Learner],
        generators: ReplicaPool[Generator],
        *,
        exact: bool,
        emit: EventSink,
    ) -> Self:
        """Make that of a run; `exact` as `Roles` has it."""
        run, sync = config.run, config.sync
        return cls(
            learner,
            generators,
            parity_every=sync.parity_every_steps,
            tolerance=sync.parity_tolerance,
            half=None if exact else HalfPrecision(sync.parity_mean, sync.parity_drift),
            max_age=run.max_lag_steps if run.stale == "drop" else None,
            waits=run.max_lag_steps == 0,
            emit=emit,
        )

    @property
    def carried(self) -> int:
        """The bytes that the last update has carried to each worker of the generators."""
        return self._layout.nbytes

    async def publish(
        self,
        version: int,
        admit: Callable[[], None],
        newcomers: Sequence[Replica[Generator]] = (),
    ) -> Gap | None:
        """Load `version` into every paused generator, call `admit` (it hands out the freed slots),
        and let them run on, behind that or before it.

        The first time, then by the first update behind each multiple of `parity_every` versions,
        and with `newcomers` (not of the pool yet), returns how far they are from the learner, else
        None. A generator that is lost on the way is retired, and the update repeated without it.
        Raises SyncFailed when those that live did not take the update (they then stay paused),
        ParityError when one is further than allowed.
        """
        with ExitStack() as syncing:
            syncing.enter_context(self._learner.held("syncing"))
            for member in (*self._pool.serving, *newcomers):
                syncing.enter_context(member.held("syncing"))
            with self._pool.updating():
                members = await self._updated(version, newcomers)
            if not self._waits:
                members = await self._run_on(members)
            admit()
            probing = version // self._parity_every > self._probed // self._parity_every
            probed = members if probing else [each for each in members if each in newcomers]
            asked = self.probe.begin(probed)
            if self._waits:
                # requests and probes are sent by tasks, and tasks of these, that have not run yet
                for _ in range(2):
                    await asyncio.sleep(0)
                await self._run_on(members)
        with self._learner.held("syncing"):
            gap = await self.probe.judged(version, asked)
        self._probed = version if probing else self._probed
        return gap

    async def _updated(
        self, version: int, newcomers: Sequence[Replica[Generator]]
    ) -> list[Replica[Generator]]:
        """The members that hold `version`, paused."""
        oldest = 0 if self._max_age is None else max(version - self._max_age, 0)
        failures = 0
        while True:
            members = [each for each in (*self._pool.serving, *newcomers) if not each.lost]
            members.sort(key=lambda each: each.index)
            try:
                if members != self._group:
                    await self._connect(members)
                if members:
                    updates = [self._update(each, version, oldest) for each in members]
                    sending = self._learner.call(Learner.send_weights, of=version)
                    await self._collectively(members, updates, sending)
                return members
            except SyncFailed:
                self._group = []  # what is left of it is of no more use
                failures += not any(each.lost for each in members)
                if failures == MAX_BROADCASTS:
                    raise

    async def _update(self, member: Replica[Generator], version: int, oldest: int) -> None:
        try:
            await member.call(Generator.update, version, self._layout, oldest, of=version)
        finally:
            self._sent[member.index] = member.sent

    async def _run_on(self, members: Sequence[Replica[Generator]]) -> list[Replica[Generator]]:
        """Let all run on; returns those that do."""
        resumed = [self._resume(each) for each in members]
        self._failed(members, await asyncio.gather(*resumed, return_exceptions=True))
        return [each for each in members if not each.lost]

    async def _resume(self, member: Replica[Generator]) -> None:
        """Let `member` run on, once the requests are there that were sent behind its update."""
        sent = member.sent - self._sent[member.index] if self._waits else 0
        await member.call(Generator.resume, sent)
        member.release()

    async def _connect(self, members: list[Replica[Generator]]) -> None:
        """Form a group: the learner listens, all members join."""
        self._group = []
        if members:
            groups = await self._learner.call(Learner.open_group, len(members))
            joining = [
                each.call(Generator.join_group, group)
                for each, group in zip(members, groups, strict=True)
            ]
            forming = self._learner.call(Learner.join_group, len(members))
            await self._collectively(members, joining, forming)
            self._layout = await self._learner.call(Learner.weight_layout)
        self._group = members

    async def _collectively(
        self,
        members: Sequence[Replica[Generator]],
        theirs: Sequence[Coroutine[Any, Any, None]],
        learner: Coroutine[Any, Any, None],
    ) -> None:
        """What all members and the learner do with one another; waits for all. Raises SyncFailed
        where one failed."""
        error, *outcomes = await asyncio.gather(learner, *theirs, return_exceptions=True)
        if isinstance(error, TimedOut):  # it may be in the hands of a member that hangs
            await self._learner.call(Learner.leave_group)
            error = SyncFailed(f"{error}")
        if isinstance(error, BaseException) and not isinstance(error, SyncFailed):
            raise error
        failures = [*self._failed(members, outcomes), *([error] if error else [])]
        if failures:
            raise SyncFailed(f"{failures[0]}") from failures[0]

    def _failed(
        self, members: Sequence[Replica[Generator]], outcomes: Sequence[BaseException | None]
    ) -> list[BaseException]:
        """The errors among the `outcomes` of `members`, of whom the lost are retired. Raises what
        is no loss."""
        errors: list[BaseException] = []
        for each, error in zip(members, outcomes, strict=True):
            if isinstance(error, ActorLost | TimedOut):
                self._pool.retire(each, str(error))
            elif error and not isinstance(error, SyncFailed):
                raise error
            if error:
                errors.append(error)
        return errors
