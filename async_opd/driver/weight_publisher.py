"""Weights from the learner to every generator, and the probe that proves they arrived."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, ParityError, SyncFailed, TimedOut
from async_opd.core.ports import Generator, Learner
from async_opd.core.wire import Ints, Rollout, WeightLayout
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool

MAX_BROADCASTS = 3  # of one version that fail though nobody is lost
Probe = asyncio.Task[tuple[Ints, Rollout]]


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
        max_age: int | None = None,
    ):
        """`max_age`: a group in flight whose oldest token is more versions behind is cut off by the
        update."""
        self._learner, self._pool = learner, generators
        self._parity_every = parity_every
        self._tolerance = tolerance
        self._max_age = max_age
        self._group: list[Replica[Generator]] = []
        self._layout = WeightLayout((), (), ())
        self._sent: dict[int, int] = {}  # calls of each generator when its last update ended

    async def publish(
        self,
        version: int,
        admit: Callable[[], None],
        newcomers: Sequence[Replica[Generator]] = (),
    ) -> float | None:
        """Load `version` into every paused generator, call `admit` (it hands out the freed slots),
        let them run on.

        Requests admitted here are all in the engine before it runs on, so a synchronous run repeats
        itself exactly. Every `parity_every` versions, and with `newcomers` (not of the pool yet),
        returns the largest parity gap in nats, else None. A generator that is lost on the way is
        retired, and the update repeated without it. Raises SyncFailed when those that live did not
        take the update (they then stay paused), ParityError when a gap is above the tolerance.
        """
        with ExitStack() as syncing:
            syncing.enter_context(self._learner.held("syncing"))
            for member in (*self._pool.serving, *newcomers):
                syncing.enter_context(member.held("syncing"))
            members = await self._updated(version, newcomers)
            admit()
            probing = version % self._parity_every == 0
            probed = members if probing else [each for each in members if each in newcomers]
            probes = [
                (each, retrieved(asyncio.create_task(each.call(Generator.probe))))
                for each in probed
            ]
            # requests and probes are sent by tasks, and tasks of these, that have not run yet
            for _ in range(2):
                await asyncio.sleep(0)
            resumed = [self._resume(each) for each in members]
            self._failed(members, await asyncio.gather(*resumed, return_exceptions=True))
        with self._learner.held("syncing"):
            gaps = [await self._gap(version, each, probe) for each, probe in probes]
        return max((gap for gap in gaps if gap is not None), default=None)

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

    async def _resume(self, member: Replica[Generator]) -> None:
        """Let `member` run on, once the requests that were sent during the pause are there."""
        await member.call(Generator.resume, member.sent - self._sent[member.index])
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

    async def _gap(self, version: int, member: Replica[Generator], probe: Probe) -> float | None:
        try:
            prompt_ids, rollout = await probe
        except (ActorLost, TimedOut) as e:
            self._pool.retire(member, str(e))
            return None
        if {span.version for span in rollout.spans} != {version}:
            raise ParityError(
                f"{rollout.id}: sampled under {rollout.spans}, expected version {version}"
            )
        learner_logp = await self._learner.call(Learner.logprobs, prompt_ids, rollout.ids)
        gap = float(np.abs(learner_logp - rollout.behaviour_logp).max())
        if not gap <= self._tolerance:
            raise ParityError(
                f"{rollout.id}: log-probs differ by {gap:.2e} nats from the learner's at version"
                f" {version}; sync.parity_tolerance = {self._tolerance:g}"
            )
        return gap
