"""Self-teachers that follow the student as it learns."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from async_opd.core.errors import ActorLost, TimedOut
from async_opd.core.ports import Learner, Teacher
from async_opd.driver.replica_pool import Pool, Seat


class Followers:
    """Teachers that take the student's weights over every so many steps, from a checkpoint that
    each of them reads.

    The learner waits for all of them, so that what is scored after an update is scored under it; a
    group that is with a teacher meanwhile may have some responses scored before it and some after,
    none in between.
    """

    def __init__(
        self, learner: Learner, teachers: Mapping[int, Sequence[Pool[Teacher]]], folder: str
    ):
        """`teachers` by the number of steps between two updates; the checkpoint in `folder` is
        replaced at each."""
        self._learner = learner
        self._teachers = teachers
        self._folder = folder

    async def follow(self, version: int) -> None:
        """Bring those that are due at `version` to the live student."""
        due = [
            pool
            for every, pools in self._teachers.items()
            if version % every == 0
            for pool in pools
        ]
        if due:
            await self._learner.save(self._folder)
            await asyncio.gather(
                *(_load(pool, seat, self._folder) for pool in due for seat in pool.serving)
            )
            for pool in due:
                pool.refuse_if_empty()

    async def save(self, folder: Path) -> None:
        """Each pool's own weights, beside the rest of a checkpoint."""
        for pool in self._pools:
            await pool.ask(lambda teacher, pool=pool: teacher.save(str(_file(folder, pool))))

    async def restore(self, folder: Path) -> None:
        """Bring every replica to where it was at that checkpoint."""
        restoring = [
            (seat, str(_file(folder, pool))) for pool in self._pools for seat in pool.serving
        ]
        await asyncio.gather(*(seat.hold(seat.port.restore(file)) for seat, file in restoring))

    @property
    def _pools(self) -> list[Pool[Teacher]]:
        return [pool for pools in self._teachers.values() for pool in pools]


async def _load(pool: Pool[Teacher], seat: Seat[Teacher], folder: str) -> None:
    try:
        await seat.hold(seat.port.load(folder))
    except (ActorLost, TimedOut) as e:
        pool.retire(seat, str(e))


def _file(folder: Path, pool: Pool) -> Path:
    return folder / f"{pool.name}.safetensors"
