"""Self-teachers that follow the student as it learns."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from async_opd.core.errors import ActorLost, TimedOut
from async_opd.core.ports import Learner, Teacher
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool


class SelfTeachers:
    """Teachers that take the student's weights over every so many steps, from a checkpoint that
    each of them reads.

    The learner waits for all of them, so that what is scored after an update is scored under it; a
    group that is with a teacher meanwhile may have some responses scored before it and some after,
    none in between.
    """

    def __init__(
        self,
        learner: Replica[Learner],
        teachers: Mapping[int, Sequence[ReplicaPool[Teacher]]],
        folder: Path,
    ):
        """`teachers` by the number of steps between two updates; the checkpoint in `folder` is
        replaced at each."""
        self._learner = learner
        self._teachers = teachers
        self._folder = str(folder)

    async def follow(self, version: int) -> None:
        """Bring those that are due at `version` to the live student."""
        due = [
            pool
            for every, pools in self._teachers.items()
            if version % every == 0
            for pool in pools
        ]
        if not due:
            return
        with self._learner.held("blocked"):
            await self._learner.call(Learner.save_whole, self._folder)
            await asyncio.gather(*(self._load(pool, r) for pool in due for r in pool.serving))
        for pool in due:
            pool.refuse_if_empty()

    async def save(self, folder: Path) -> None:
        """Write each pool's own weights, beside the rest of a checkpoint."""
        for pool in self._pools:
            await pool.ask(Teacher.save, str(_file(folder, pool)))

    async def restore(self, folder: Path) -> None:
        """Bring every replica to where it was at that checkpoint."""
        restoring = [
            (each, str(_file(folder, pool))) for pool in self._pools for each in pool.serving
        ]
        await asyncio.gather(*(each.call(Teacher.restore, file) for each, file in restoring))

    @property
    def _pools(self) -> list[ReplicaPool[Teacher]]:
        return [pool for pools in self._teachers.values() for pool in pools]

    async def _load(self, pool: ReplicaPool[Teacher], replica: Replica[Teacher]) -> None:
        try:
            with replica.held("syncing"):
                await replica.call(Teacher.load, self._folder)
        except (ActorLost, TimedOut) as e:
            pool.retire(replica, str(e))


def _file(folder: Path, pool: ReplicaPool[Teacher]) -> Path:
    return folder / f"{pool.name}.safetensors"
