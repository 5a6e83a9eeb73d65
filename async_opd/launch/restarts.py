"""How often a run that lost what it needs is started again, and after what wait."""

from async_opd.config.sections import RunConfig
from async_opd.core.errors import (
    ActorLost,
    AsyncOpdError,
    CallFailed,
    SyncFailed,
    SystemFailed,
    TimedOut,
)

# what a new start, from a checkpoint or from the beginning, can repair
LOST = (ActorLost, CallFailed, SyncFailed, SystemFailed, TimedOut)
WAIT_S = 1.0  # ahead of the second restart in a row without progress, then twice as long each
MOST_S = 60.0


class Restarts:
    """The restarts of one run: so many within so many steps of progress. What is trained again is
    no progress."""

    def __init__(self, config: RunConfig):
        self.count = 0
        self.ready = False  # every actor was, once: until then only a dead process is a loss
        self._most = config.max_restarts
        self._within = config.restart_steps
        self._reached = 0  # the highest step so far
        self._in_a_row = 0  # without progress
        self._behind: list[int] = []  # the steps that were reached at restarts which count

    def wait_s(self, error: AsyncOpdError, step: int) -> float | None:
        """Count one more, for `error` behind `step`; returns how long to wait before it, or None
        where there is to be none: the restarts are used up, or what cannot start will not start
        then either."""
        if not self.ready and type(error) is not ActorLost:
            return None
        progress = step > self._reached
        self._reached = max(self._reached, step)
        self._behind = [step for step in self._behind if self._reached - step < self._within]
        if len(self._behind) >= self._most:
            return None
        self._in_a_row = 0 if progress or not self.count else self._in_a_row + 1
        self._behind.append(self._reached)
        self.count += 1
        return min(WAIT_S * 2 ** (self._in_a_row - 1), MOST_S) if self._in_a_row else 0.0
