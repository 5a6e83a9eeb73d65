"""The verifier pool as the stream sees it: whole groups of token ids in, verdicts out."""

import asyncio
from collections.abc import Callable

import numpy as np

from async_opd.verify.config import VerifyConfig
from async_opd.verify.pool import VerifierPool
from async_opd.wire import Check, Group, Verdict


class GroupVerifier:
    """Decodes responses and has each checked against its prompt's reference answer."""

    def __init__(self, config: VerifyConfig, decode: Callable[[np.ndarray], str]):
        self._config, self._decode = config, decode
        self._pool = VerifierPool(config.workers, config.timeout_s, config.memory_gib)

    async def start(self) -> None:
        """Start the workers and wait until they are ready."""
        await self._pool.start()

    async def check(self, group: Group) -> tuple[Verdict, ...]:
        """A verdict for each rollout of `group`, side by side."""
        checks = (
            Check(id=r.id, kind=self._config.check, response=self._decode(r.ids), answer=group.prompt.answer)
            for r in group.rollouts
        )
        return tuple(await asyncio.gather(*map(self._pool.check, checks)))

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        """A verdict for one response that is no rollout, such as the teacher's own."""
        return await self._pool.check(Check(id=id, kind=self._config.check, response=self._decode(ids), answer=answer))
