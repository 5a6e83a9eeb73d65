"""A pool of killable processes that check responses.

A check's deadline starts when a ready worker picks it up: neither its time in the queue nor a
worker's start counts. Late or crashed, a check is unknown, never wrong, and not tried again; its
worker is killed and replaced.
"""

import asyncio

from async_opd.core.errors import ActorLost, ConfigError
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.process import WorkerProcess

MAX_FAILED_STARTS = 3  # in a row, over all workers


class VerifierPool:
    """`workers` processes that serve `check` first come, first served."""

    def __init__(self, config: VerifyConfig, start_timeout_s: float = 60.0):
        """Keep the settings. `start_timeout_s` bounds a worker's imports. A check that takes more
        than half of a worker's memory is unknown."""
        self._config, self._start_timeout_s = config, start_timeout_s
        self._queue: asyncio.Queue[tuple[Check, asyncio.Future[Verdict]]] = asyncio.Queue()
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
        """Wait for the verdict, unknown with a cause if the check timed out or crashed. Raises
        ActorLost if the pool is not running or workers cannot be started any more."""
        if self._lost:
            raise self._lost
        verdict = self._promise()
        self._queue.put_nowait((check, verdict))
        return await verdict

    async def close(self) -> None:
        """Kill the workers. Checks still waiting raise ActorLost."""
        self._lose(ActorLost("verifier pool is closed"))
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)

    async def _slot(self, ready: asyncio.Future) -> None:
        """Keep one worker, or its replacement, at work for as long as the pool runs."""
        worker = await self._spawn()
        try:
            ready.set_result(None)
            while True:
                check, verdict = await self._queue.get()
                if verdict.done():  # its caller gave up
                    continue
                if not worker.alive:  # it died idle, which is not this check's fault
                    worker = await self._spawn()
                answer = await worker.ask(check, self._config.timeout_s)
                if not verdict.done():
                    verdict.set_result(answer)
                if not worker.alive:
                    worker = await self._spawn()
        finally:
            await worker.kill()

    async def _spawn(self) -> WorkerProcess:
        while True:
            try:
                worker = await WorkerProcess.spawn(self._config, self._start_timeout_s)
            except (ActorLost, ConfigError) as error:
                self._failed_starts += 1
                if self._failed_starts >= MAX_FAILED_STARTS:
                    why = f"verifier: {MAX_FAILED_STARTS} starts in a row failed, last {error}"
                    raise type(error)(why) from error
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
