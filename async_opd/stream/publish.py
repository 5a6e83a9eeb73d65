"""Weights from the learner to every generator, and the probe that proves they arrived."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from async_opd.errors import ParityError, SyncFailed
from async_opd.ports import Generator, Learner


class Publisher:
    """One weight group over all generators; an update reaches all of them or fails by name."""

    def __init__(self, learner: Learner, generators: Sequence[Generator], *, parity_every: int, tolerance: float):
        self._learner, self._generators = learner, generators
        self._parity_every, self._tolerance = parity_every, tolerance

    async def connect(self) -> None:
        """Form the group: the learner listens, all generators join."""
        infos = await self._learner.open_group(len(self._generators))
        joining = (g.join_group(info) for g, info in zip(self._generators, infos, strict=True))
        await asyncio.gather(self._learner.join_group(len(self._generators)), *joining)
        self._update_info = await self._learner.update_info()

    async def publish(self, version: int, admit: Callable[[], None]) -> float | None:
        """Load `version` into every paused generator, call `admit` (it hands out the freed slots), let them run on.

        Requests admitted here are all in the engine before it runs on, so a synchronous run repeats itself exactly.
        Every `parity_every` versions returns the parity gap in nats, else None. Raises SyncFailed when a generator
        did not take the update (it then stays paused), ParityError when the gap is above the tolerance.
        """
        updates = (g.update(version, self._update_info) for g in self._generators)
        try:
            await asyncio.gather(self._learner.send_weights(), *updates)
        except SyncFailed:
            await asyncio.gather(*(g.check_health() for g in self._generators))  # a dead one is the better name for it
            raise
        admit()
        probing = version % self._parity_every == 0
        probes = [asyncio.ensure_future(g.probe()) for g in self._generators] if probing else []
        await asyncio.sleep(0)  # requests and probes are submitted by tasks that have not run yet
        await asyncio.gather(*(g.resume() for g in self._generators))
        gaps = [await self._gap(version, *await probe) for probe in probes]
        return max(gaps, default=None)

    async def _gap(self, version: int, prompt_ids: np.ndarray, rollout) -> float:
        if {span.version for span in rollout.spans} != {version}:
            raise ParityError(f"{rollout.id}: sampled under {rollout.spans}, expected version {version}")
        learner_logp = await self._learner.logprobs(prompt_ids, rollout.ids)
        gap = float(np.abs(learner_logp - rollout.behaviour_logp).max())
        if not gap <= self._tolerance:
            raise ParityError(
                f"{rollout.id}: log-probs differ by {gap:.2e} nats from the learner's at version {version}; "
                f"sync.parity_tolerance = {self._tolerance:g}"
            )
        return gap
