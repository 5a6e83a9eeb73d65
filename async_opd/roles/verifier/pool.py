"""A pool of killable processes that check responses.

A check's deadline starts when a ready worker picks it up: neither its time in the queue nor a
worker's start counts. Late or crashed, it costs its worker, which is killed and replaced.

Each check first gets a short deadline. One that is late is asked again, behind all that nobody was
asked yet, in a worker that was asked nothing before, and with the whole deadline. Late there too it
is wrong, if that worker decided a known answer well in time before, the reference itself, and was
not kept from its work. All else that is late, and what crashes, is unknown. The first that any
worker decides is a reference: what libraries do once a process is no check's time.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import count
from statistics import median

import msgspec

from async_opd.core.errors import ActorLost, ConfigError
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.checks import bounded
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.process import WorkerProcess

MAX_FAILED_STARTS = 3  # in a row, over all workers
# The short deadline is the largest of a share of the whole one, of what any check may take on a
# busy machine, and of so many times what the last ones took.
FIRST_SHARE = 0.1
FIRST_S = 0.25
TIMES_USUAL = 10
LAST = 100
WELL_IN_TIME = 0.5  # of a deadline, for a known answer


@dataclass
class _Seat:
    """The place of a worker and of those that replace it."""

    worker: WorkerProcess


class VerifierPool:
    """`workers` processes that serve `check`, first come, first served, and who was late last."""

    def __init__(self, config: VerifyConfig, start_timeout_s: float = 60.0):
        """Keep the settings. `start_timeout_s` bounds a worker's imports. A check that takes more
        than half of a worker's memory is unknown."""
        self._config, self._start_timeout_s = config, start_timeout_s
        # whether it was late, its place in the queue, what is asked, and who waits for it
        self._queue: asyncio.PriorityQueue[tuple[bool, int, Check, asyncio.Future[Verdict]]] = (
            asyncio.PriorityQueue()
        )
        self._bounded = bounded(config.check)
        self._places = count()
        self._took: deque[float] = deque(maxlen=LAST)  # s, by the checks that were decided
        self._waiting: set[asyncio.Future] = set()
        self._slots: list[asyncio.Task] = []
        self._failed_starts = 0
        self._lost: ActorLost | ConfigError | None = ActorLost("verifier pool is not started")

    async def start(self) -> None:
        """Start the workers and wait until all are ready. Raises ActorLost, and ConfigError if
        the check cannot be used here."""
        self._lost = None
        ready = [self._promise() for _ in range(self._config.workers)]
        self._slots = [asyncio.create_task(self._slot(future)) for future in ready]
        for slot in self._slots:
            slot.add_done_callback(self._slot_ended)
        try:
            await asyncio.gather(*ready)
        except BaseException:
            await self.close()
            raise

    async def check(self, check: Check) -> Verdict:
        """Wait for the verdict, with a cause if the check was late or crashed. Raises ActorLost if
        the pool is not running or workers cannot be started any more."""
        if self._lost:
            raise self._lost
        verdict = self._promise()
        self._queue.put_nowait((False, next(self._places), check, verdict))
        return await verdict

    async def close(self) -> None:
        """Kill the workers. Checks still waiting raise ActorLost."""
        self._lose(ActorLost("verifier pool is closed"))
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)

    async def _slot(self, ready: asyncio.Future) -> None:
        """Keep one worker, or its replacement, at work for as long as the pool runs."""
        seat = _Seat(await self._spawn())
        try:
            ready.set_result(None)
            while True:
                was_late, _, check, verdict = await self._queue.get()
                if verdict.done():  # its caller gave up
                    continue
                if not seat.worker.alive:  # it died idle, which is not this check's fault
                    seat.worker = await self._spawn()
                if was_late:
                    answer = await self._again(seat, check)
                else:
                    answer = await self._first(seat, check)
                if seat.worker.late and not was_late:
                    self._queue.put_nowait((True, next(self._places), check, verdict))
                elif not verdict.done():
                    verdict.set_result(answer)
                if not seat.worker.alive:
                    seat.worker = await self._spawn()
        finally:
            await seat.worker.kill()

    async def _first(self, seat: "_Seat", check: Check) -> Verdict:
        """Ask within the short deadline; unknown where a new worker dies of the reference."""
        if not (self._bounded or seat.worker.used):
            known, _ = await self._known(seat.worker, check)
            if not seat.worker.alive:
                if not seat.worker.late:
                    return known
                seat.worker = await self._spawn()
        return await self._ask(seat.worker, check, self._short_s)

    async def _again(self, seat: "_Seat", check: Check) -> Verdict:
        """Ask once more for what was late, in a worker that was asked nothing, but of a check that
        starts anew by itself."""
        whole_s = self._config.timeout_s
        if self._bounded:
            return await self._ask(seat.worker, check, whole_s)
        if seat.worker.used:
            await seat.worker.kill()
            seat.worker = await self._spawn()
        known, in_time = await self._known(seat.worker, check)
        if not seat.worker.alive:
            seat.worker = await self._spawn()
        answer = await self._ask(seat.worker, check, whole_s)
        if not (in_time and seat.worker.hung):
            return answer
        return Verdict(
            id=check.id,
            reward=0.0,
            cause=f"{answer.cause}, a second time, alone",
            answer=None if known.answer is None else "",
        )

    async def _known(self, worker: WorkerProcess, check: Check) -> tuple[Verdict, bool]:
        """Ask for the verdict on the reference itself, and tell whether it came well in time."""
        whole_s = self._config.timeout_s
        itself = msgspec.structs.replace(check, response=check.answer)
        known = await worker.ask(itself, whole_s)
        return known, known.reward is not None and worker.took_s <= WELL_IN_TIME * whole_s

    async def _ask(self, worker: WorkerProcess, check: Check, within_s: float) -> Verdict:
        if self._bounded:
            verdict = await worker.ask(check, self._config.timeout_s, within_s)
        else:
            verdict = await worker.ask(check, within_s)
        if verdict.reward is not None:
            self._took.append(worker.took_s)
        return verdict

    @property
    def _short_s(self) -> float:
        usual_s = median(self._took) if self._took else 0.0
        short_s = max(FIRST_SHARE * self._config.timeout_s, FIRST_S, TIMES_USUAL * usual_s)
        return min(self._config.timeout_s, short_s)

    async def _spawn(self) -> WorkerProcess:
        while True:
            try:
                worker = await WorkerProcess.spawn(self._config, self._start_timeout_s)
            except (ActorLost, ConfigError) as error:
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS:
                    raise type(error)(
                        f"verifier: {MAX_FAILED_STARTS} starts in a row failed, last {error}"
                    ) from error
            else:
                self._failed_starts = 0
                return worker

    def _promise(self) -> asyncio.Future:
        """Make a future that `_lose` fails."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def _slot_ended(self, slot: asyncio.Task) -> None:
        if not slot.cancelled():
            why = slot.exception()
            self._lose(why if isinstance(why, ConfigError) else ActorLost(f"{why}"))

    def _lose(self, why: ActorLost | ConfigError) -> None:
        self._lost = self._lost or why
        for future in list(self._waiting):
            if not future.done():  # as its caller has just given up
                future.set_exception(self._lost)
