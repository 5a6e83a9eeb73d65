"""Weights from the learner to every generator, and the probe that proves they arrived."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import numpy as np

from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, ParityError, SyncFailed, TimedOut
from async_opd.core.ports import Generator, Learner
from async_opd.driver.replica_pool import Pool, Seat

MAX_BROADCASTS = 3  # of one version that fail though nobody is lost


class Publisher:
    """One weight group over all generators, formed anew whenever its members change. An update
    reaches every member that lives, or fails by name."""

    def __init__(
        self,
        learner: Learner,
        generators: Pool[Generator],
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
        self._group: list[Seat[Generator]] = []

    async def publish(
        self, version: int, admit: Callable[[], None], newcomers: Sequence[Seat[Generator]] = ()
    ) -> float | None:
        """Load `version` into every paused generator, call `admit` (it hands out the freed slots),
        let them run on.

        Requests admitted here are all in the engine before it runs on, so a synchronous run repeats
        itself exactly. Every `parity_every` versions, and with `newcomers` (not of the pool yet),
        returns the largest parity gap in nats, else None. A generator that is lost on the way is
        retired, and the update repeated without it. Raises SyncFailed when those that live did not
        take the update (they then stay paused), ParityError when a gap is above the tolerance.
        """
        members = await self._updated(version, newcomers)
        admit()
        probing = version % self._parity_every == 0
        probed = members if probing else [seat for seat in members if seat in newcomers]
        probes = [
            (seat, retrieved(asyncio.ensure_future(seat.hold(seat.port.probe()))))
            for seat in probed
        ]
        await asyncio.sleep(0)  # requests and probes are submitted by tasks that have not run yet
        resumed = [seat.hold(seat.port.resume()) for seat in members]
        self._failed(members, await asyncio.gather(*resumed, return_exceptions=True))
        gaps = [await self._gap(version, seat, probe) for seat, probe in probes]
        return max((gap for gap in gaps if gap is not None), default=None)

    async def _updated(
        self, version: int, newcomers: Sequence[Seat[Generator]]
    ) -> list[Seat[Generator]]:
        """The members that hold `version`, paused."""
        oldest = 0 if self._max_age is None else max(version - self._max_age, 0)
        failures = 0
        while True:
            members = [seat for seat in (*self._pool.serving, *newcomers) if not seat.lost]
            members.sort(key=lambda seat: seat.index)
            try:
                if members != self._group:
                    await self._connect(members)
                if members:
                    updates = [
                        seat.port.update(version, self._update_info, oldest) for seat in members
                    ]
                    await self._collectively(members, updates, self._learner.send_weights())
                return members
            except SyncFailed:
                self._group = []  # what is left of it is of no more use
                failures += not any(seat.lost for seat in members)
                if failures == MAX_BROADCASTS:
                    raise

    async def _connect(self, members: list[Seat[Generator]]) -> None:
        """Form a group: the learner listens, all members join."""
        self._group = []
        if members:
            infos = await self._learner.open_group(len(members))
            joining = [
                seat.port.join_group(info) for seat, info in zip(members, infos, strict=True)
            ]
            await self._collectively(members, joining, self._learner.join_group(len(members)))
            self._update_info = await self._learner.update_info()
        self._group = members

    async def _collectively(
        self, members: Sequence[Seat[Generator]], theirs: list[Coroutine], own: Coroutine
    ) -> None:
        """What all members and the learner do with one another; waits for all. Raises SyncFailed
        where one failed."""
        error, *found = await asyncio.gather(
            own, *map(Seat.hold, members, theirs), return_exceptions=True
        )
        if isinstance(error, BaseException) and not isinstance(error, SyncFailed):
            raise error
        failures = [*self._failed(members, found), *([error] if error else [])]
        if failures:
            raise SyncFailed(f"{failures[0]}") from failures[0]

    def _failed(self, members: Sequence[Seat[Generator]], found: list) -> list[BaseException]:
        """The errors among what was `found` of `members`, of whom the lost are retired. Raises what
        is no loss."""
        failures = [
            (seat, error) for seat, error in zip(members, found, strict=True) if error is not None
        ]
        for seat, error in failures:
            if isinstance(error, ActorLost | TimedOut):
                self._pool.retire(seat, str(error))
            elif not isinstance(error, SyncFailed):
                raise error
        return [error for _, error in failures]

    async def _gap(
        self, version: int, seat: Seat[Generator], probe: asyncio.Future
    ) -> float | None:
        try:
            prompt_ids, rollout = await probe
        except (ActorLost, TimedOut) as e:
            self._pool.retire(seat, str(e))
            return None
        if {span.version for span in rollout.spans} != {version}:
            raise ParityError(
                f"{rollout.id}: sampled under {rollout.spans}, expected version {version}"
            )
        learner_logp = await self._learner.logprobs(prompt_ids, rollout.ids)
        gap = float(np.abs(learner_logp - rollout.behaviour_logp).max())
        if not gap <= self._tolerance:
            raise ParityError(
                f"{rollout.id}: log-probs differ by {gap:.2e} nats from the learner's at version"
                f" {version}; sync.parity_tolerance = {self._tolerance:g}"
            )
        return gap
