"""How often a run that lost what it needs is started again, after what wait, and from where."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from async_opd.config.schema import Config
from async_opd.core.aside import aside
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    SyncFailed,
    SystemFailed,
    TimedOut,
)
from async_opd.core.events import EventSink
from async_opd.core.foreign import foreign
from async_opd.driver.checkpoints import Checkpoint, find, newest, thread_of

# what a new start, from a checkpoint or from the beginning, can repair
LOST = (ActorLost, CallFailed, SyncFailed, SystemFailed, TimedOut)
WAIT_S = 1.0  # ahead of the second restart in a row without progress, then twice as long each
MOST_S = 60.0


class Restarts:
    """The restarts of one run: at most `run.max_restarts` within `run.restart_steps` of progress.
    What is trained again is no progress."""

    def __init__(self, config: Config, run_dir: Path, start: dict[str, Any], emit: EventSink):
        """`start` is where the prompts stand at the beginning."""
        self.count = 0
        self.ready = False  # every actor was, once: what could not start will not start now
        self._config = config
        self._run_dir = run_dir
        self._start = start
        self._emit = emit
        self._reached = 0  # the highest step so far
        self._in_a_row = 0  # without progress
        self._behind: list[int] = []  # the steps that were reached at restarts which count

    async def goes_on_from(
        self, error: AsyncOpdError, step: int, begun: Checkpoint | None
    ) -> Checkpoint:
        """Count one more, for `error` behind `step`, and wait before it; returns the newest
        checkpoint, or the start; or where nothing was trained since the one from which this run had
        `begun`, that one: later ones may lie there still. Raises `error` where the restarts are
        used up, or where the actors have never been ready, and CheckpointError."""
        wait_s = self._wait_s(step) if self.ready else None
        if wait_s is None:
            raise error
        look = self._newest
        if begun and 0 < begun.state.version == step:
            look = partial(find, begun.folder)
        thread, within_s = thread_of(self._run_dir), self._config.timeout.step_s
        checkpoint = await aside(within_s, "newest checkpoint", look, thread=thread)
        behind = f", in {wait_s:g} s" if wait_s else ""
        where = f"from step {checkpoint.state.version}{behind}"
        self._emit("starts again", "run", f"{where}, for {type(error).__name__}: {error}")
        await asyncio.sleep(wait_s)
        return checkpoint

    def _newest(self) -> Checkpoint:
        with foreign(f"{self._run_dir}: its checkpoints", SystemFailed):
            return newest(self._run_dir, self._start)

    def _wait_s(self, step: int) -> float | None:
        """How long to wait before one more; None where they are used up."""
        progress = step > self._reached
        self._reached = max(self._reached, step)
        within = self._config.run.restart_steps
        self._behind = [earlier for earlier in self._behind if self._reached - earlier < within]
        if len(self._behind) >= self._config.run.max_restarts:
            return None
        self._in_a_row = 0 if progress or not self.count else self._in_a_row + 1
        self._behind.append(self._reached)
        self.count += 1
        return min(WAIT_S * 2 ** (self._in_a_row - 1), MOST_S) if self._in_a_row else 0.0


@contextmanager
def not_again(error: AsyncOpdError) -> Generator[None]:
    """Raise `error`, which ended a run, where the way to another start fails: by what is a note of
    it."""
    try:
        yield
    except AsyncOpdError as second:
        if second is not error:
            error.add_note(f"not started again: {second}")
        raise error from None
