"""A learner rank's part in weight updates: the group over all generators' workers, of which rank 0
is a member, and what all ranks gather for it."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial

import torch

from async_opd.core.aio import retrieved
from async_opd.core.aside import DaemonThread
from async_opd.core.errors import SyncFailed
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.weights import WeightGroup
from async_opd.roles.learner.weights import StudentWeights
from async_opd.roles.weight_sync.nccl import load_library
from async_opd.roles.weight_sync.sender import SENDERS, Sender


class LearnerGroup:
    """Joins and broadcasts in threads, so that a rank still answers while it waits for others."""

    _sender: Sender | None = None
    _going_on: "asyncio.Future[None] | None" = None  # the last join or broadcast

    def __init__(self, rank: int, settings: LearnerSettings, weights: StudentWeights):
        """Rank 0 imports what it sends by: in a join it would keep all members waiting."""
        self._rank = rank
        self._settings = settings
        self._weights = weights
        if rank == 0 and settings.backend == "nccl":
            load_library()

    def open(self, host: str, generators: int, ranks: int) -> list[WeightGroup]:
        """Rank 0: leave the group before, and prepare at `host` one with so many generators of so
        many `ranks` each; returns where each of them joins."""
        if self._sender:
            self._sender.leave()
        settings = self._settings
        self._sender = SENDERS[settings.backend](
            host, bucket_bytes=settings.bucket_bytes, timeout_s=settings.sync_s
        )
        world = 1 + generators * ranks
        return [self._sender.group(1 + i * ranks, world) for i in range(generators)]

    async def join(self, world: int) -> None:
        """Rank 0: wait for the opened group's members. Raises SyncFailed when one stays away."""
        sender = self._sender
        assert sender, "join without open"
        what = f"the weight group of {world} members did not form"
        await self._beside(what, partial(sender.join, world))

    async def send(self, version: int) -> None:
        """Rank 0 broadcasts the live weights, `version`. Raises SyncFailed when a member is gone or
        slow, DataError where a weight is not as it was described."""
        await self._beside(f"the broadcast of version {version} broke off", self._send)

    async def leave(self) -> None:
        """Rank 0: end the group; returns once no join or broadcast goes on any more."""
        if self._sender:
            await asyncio.to_thread(self._sender.leave)
        if self._going_on:
            await asyncio.wait([self._going_on])

    def _send(self) -> None:
        weights = self._weights.tensors()
        try:
            if self._rank == 0:
                sender = self._sender
                assert sender, "send without open"
                with ExitStack() as broken:
                    broken.callback(sender.leave)  # the others need not wait
                    sender.send(self._weights.described, weights)
                    broken.pop_all()
        finally:
            for _ in weights:  # every rank gathers to the end, also where the broadcast broke off
                pass

    async def _beside(self, failure: str, work: Callable[[], None]) -> None:
        """Do `work` in a thread, on this one's stream. Raises SyncFailed, which begins with
        `failure`, for what torch and the network raise."""
        cuda = torch.cuda.is_available()
        stream = torch.cuda.current_stream() if cuda else None

        def on_stream() -> None:
            with torch.cuda.stream(stream) if stream else nullcontext():
                work()

        thread = DaemonThread("weights")
        loop = asyncio.get_running_loop()
        self._going_on = retrieved(loop.run_in_executor(thread, on_stream))
        thread.shutdown()
        try:
            await asyncio.shield(self._going_on)
        except (RuntimeError, OSError) as e:
            raise SyncFailed(f"{failure}: {e}") from e
