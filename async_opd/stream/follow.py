"""Self-teachers that follow the student as it learns."""

import asyncio
from collections.abc import Mapping, Sequence

from async_opd.ports import Learner, Teacher


class Followers:
    """Teachers that take the student's weights over every so many steps, from a checkpoint that each of them reads.

    The learner waits for all of them, so that what is scored after an update is scored under it; a group that is with a
    teacher meanwhile may have some responses scored before it and some after, none in between.
    """

    def __init__(self, learner: Learner, teachers: Mapping[int, Sequence[Teacher]], folder: str):
        """`teachers` by the number of steps between two updates; the checkpoint in `folder` is replaced at each."""
        self._learner, self._teachers, self._folder = learner, teachers, folder

    async def follow(self, version: int) -> None:
        """Bring those that are due at `version` to the live student."""
        due = [teacher for every, pool in self._teachers.items() if version % every == 0 for teacher in pool]
        if due:
            await self._learner.save(self._folder)
            await asyncio.gather(*(teacher.load(self._folder) for teacher in due))
