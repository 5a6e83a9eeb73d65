import asyncio
import time

import numpy as np

from async_opd.verify.config import VerifyConfig
from async_opd.verify.group import PATIENCE_S, GroupVerifier
from async_opd.wire import Group, Prompt, Rollout, Span, Verdict


def group(id: str, answer: str) -> Group:
    ids = np.array([1], np.int32)
    logp = np.array([-1.0], np.float32)
    spans = (Span(version=0, start=0, end=1),)
    rollout = Rollout(id=f"{id}#0", ids=ids, behaviour_logp=logp, spans=spans, truncated=False)
    return Group(prompt=Prompt(id=id, ids=ids, answer=answer), rollouts=(rollout,))


class Pool:
    """Decides at once, but for the answer "slow", which waits for `decided`."""

    def __init__(self):
        self.decided = asyncio.Event()

    async def check(self, check) -> Verdict:
        if check.answer == "slow":
            await self.decided.wait()
        return Verdict(id=check.id, correct=True)


async def test_a_slow_check_does_not_hold_up_the_groups_beside_it():
    verifier = GroupVerifier(VerifyConfig(), lambda ids: "", within_s=60.0)
    verifier._pool = pool = Pool()
    started = time.monotonic()
    quick, slow = await verifier.check_all(group("0@0", "2"), group("1@0", "slow"))
    assert quick == (Verdict(id="0@0#0", correct=True),) and slow == "1@0"
    assert PATIENCE_S <= time.monotonic() - started < PATIENCE_S + 1
    pool.decided.set()
    assert await verifier.late(slow) == (Verdict(id="1@0#0", correct=True),)


async def test_quick_checks_do_not_wait_at_all():
    verifier = GroupVerifier(VerifyConfig(), lambda ids: "", within_s=60.0)
    verifier._pool = Pool()
    started = time.monotonic()
    assert len(await verifier.check_all(*(group(f"{i}@0", "2") for i in range(5)))) == 5
    assert time.monotonic() - started < PATIENCE_S


async def test_what_no_worker_came_to_in_time_is_unknown_and_no_timeout_of_the_caller():
    verifier = GroupVerifier(VerifyConfig(), lambda ids: "", within_s=0.5)
    verifier._pool = Pool()
    async with asyncio.timeout(0.5):
        verdicts = await verifier.check(group("0@0", "slow"))
    assert verdicts == (Verdict(id="0@0#0", correct=None, cause="no worker was free within 0.5 s"),)
