"""The verifier pool as the stream sees it: whole groups of token ids in, verdicts out."""

import asyncio
from collections.abc import Callable

import numpy as np

from async_opd.verify.config import VerifyConfig
from async_opd.verify.pool import VerifierPool
from async_opd.wire import Check, Group, Verdict

SHARE = 0.9  # of the time that a caller waits, so that it hears of the verdict
PATIENCE_S = 0.5  # the longest a quick check waits for a slow one beside it


class GroupVerifier:
    """Decodes responses and has each checked against its prompt's reference answer."""

    def __init__(self, config: VerifyConfig, decode: Callable[[np.ndarray], str], within_s: float):
        """`within_s` is how long its caller waits for a verdict."""
        self._decode, self._within_s = decode, SHARE * within_s
        self._pool = VerifierPool(config)
        self._late: dict[str, asyncio.Task] = {}

    async def start(self) -> None:
        """Start the workers and wait until they are ready."""
        await self._pool.start()

    async def check(self, group: Group) -> tuple[Verdict, ...]:
        """A verdict for each rollout of `group`, side by side."""
        checks = (self.check_response(r.id, r.ids, group.prompt.answer) for r in group.rollouts)
        return tuple(await asyncio.gather(*checks))

    async def check_all(self, *groups: Group) -> list[tuple[Verdict, ...] | str]:
        """The verdicts of each group; for one that is not decided in PATIENCE_S its id, to be asked for by `late`."""
        checks = {group.prompt.id: asyncio.create_task(self.check(group)) for group in groups}
        await asyncio.wait(checks.values(), timeout=PATIENCE_S)
        self._late |= {id: check for id, check in checks.items() if not check.done()}
        return [check.result() if check.done() else id for id, check in checks.items()]

    async def late(self, id: str) -> tuple[Verdict, ...]:
        """The verdicts of a group that was slow."""
        return await self._late.pop(id)

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        """A verdict for one response; unknown, where the workers are too busy with others to give one in time."""
        try:
            async with asyncio.timeout(self._within_s):
                return await self._pool.check(Check(id=id, response=self._decode(ids), answer=answer))
        except TimeoutError:
            return Verdict(id=id, correct=None, cause=f"no worker was free within {self._within_s:.1f} s")
