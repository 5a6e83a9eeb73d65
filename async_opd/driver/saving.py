"""When a run saves, what an end of it waits for, and the learner that both need."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, TypeVarTuple

from async_opd.config.sections import RunConfig
from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, AsyncOpdError, TimedOut
from async_opd.core.ports import Learner, ScoredGroup
from async_opd.core.wire import StepResult
from async_opd.driver.replica import Replica
from async_opd.telemetry.spans import Of

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class LearnerReplica(Replica[Learner]):
    """The learner, whose place nobody takes. With its first rank that is lost, or does not answer,
    it is given up: what it holds is of no known version, and nothing more is asked of it."""

    async def call(
        self,
        method: Callable[[Learner, *Ts], Coroutine[Any, Any, T]],
        *args: *Ts,
        of: Of = "",
    ) -> T:
        """Await `method` as `Replica.call` does."""
        try:
            return await super().call(method, *args, of=of)
        except (ActorLost, TimedOut) as e:
            self.leave(f"{e}")
            raise

    async def step(self, batch: Sequence[ScoredGroup]) -> StepResult:
        """Train one step of `batch`. Where it begins with scores of the learner's own, these are a
        span of theirs."""
        ids, start = tuple(group.prompt.id for group in batch), self._time.now()
        result = await self.call(Learner.step, batch, of=ids)
        if scoring_s := result.metrics.get("scoring_s"):
            self._time.called("score", ids, start, start + scoring_s)
        return result


class CheckpointClock:
    """Says behind which steps a checkpoint is due: by their number, or by the time since the
    last."""

    def __init__(self, config: RunConfig):
        self._every_steps = config.checkpoint_every_steps
        self._every_s = 60 * config.checkpoint_minutes
        self.start()

    def start(self) -> None:
        """Count the time from now on."""
        self._last = asyncio.get_running_loop().time()

    def due(self, step: int) -> bool:
        """Whether one is due behind `step`; the time then counts anew, however the save ends."""
        passed_s = asyncio.get_running_loop().time() - self._last
        by_steps = self._every_steps > 0 and step % self._every_steps == 0
        is_due = by_steps or 0 < self._every_s <= passed_s
        if is_due:
            self.start()
        return is_due


class AtWork:
    """What goes on where its caller is cancelled: the step at hand, or a save."""

    def __init__(self) -> None:
        self._work: asyncio.Future[None] | None = None

    async def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`; where that is cut off, `over` waits for it."""
        self._work = retrieved(asyncio.ensure_future(work))
        await asyncio.shield(self._work)

    async def over(self) -> None:
        """Wait for what is still at work. A named error of it is its caller's; any other is raised:
        what it leaves may not be as the books say."""
        if self._work is None:
            return
        await asyncio.wait([self._work])
        error = self._work.exception()
        if error and not isinstance(error, AsyncOpdError):
            raise error

    async def settled(self, within_s: float) -> None:
        """Wait for it at most `within_s`: a save that goes on behind the next start would be taken
        for its own."""
        if self._work:
            await asyncio.wait([self._work], timeout=within_s)
