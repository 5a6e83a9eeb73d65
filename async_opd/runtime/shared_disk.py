"""Whether a run directory is one disk to all who use it."""

import asyncio
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import teacher_section
from async_opd.core.aside import aside
from async_opd.core.errors import ConfigError, SystemFailed
from async_opd.core.foreign import foreign
from async_opd.runtime.actors import RemoteActor
from async_opd.runtime.nodes import driver_node
from async_opd.runtime.placement import RANK


async def check_shared(config: Config, actors: Iterable[RemoteActor]) -> None:
    """Raise ConfigError where one of `actors` that writes to the run directory, or reads there, has
    another disk."""
    moving = (
        teacher_section(name)
        for name, teacher in config.named_teachers.items()
        if teacher.update != "frozen"
    )
    roles = {RANK, *moving}
    far = [actor for actor in actors if actor.request.role in roles and actor.node != driver_node()]
    if not far:
        return
    folder, what = Path(config.run.dir).absolute(), "look at the run directory"
    start_s = config.timeout.start_s
    with foreign(f"run.dir = {config.run.dir!r}", SystemFailed):
        file = await aside(start_s, what, _mark, folder)
    try:
        looks = (actor.ask_host(start_s, "sees", str(file), what=what) for actor in far)
        seen = await asyncio.gather(*looks)
    finally:
        await aside(start_s, what, file.unlink)
    blind = [actor.name for actor, sees in zip(far, seen, strict=True) if not sees]
    if blind:
        raise ConfigError(
            f"run.dir = {config.run.dir!r}: not seen by {', '.join(blind)}; it must lie on a"
            " disk that every node sees, or all of them must fit on the driver's node"
        )


def _mark(folder: Path) -> Path:
    """Make an empty file that nobody else has."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".seen-")
    os.close(descriptor)
    return Path(name)
