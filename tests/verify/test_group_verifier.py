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
    assert quick == (Verdict(id="0@0#0", correct=True),) and isinstance(slow, str)
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


async def test_groups_that_share_an_id_each_get_their_own_verdicts():
    verifier = GroupVerifier(VerifyConfig(), lambda ids: "", within_s=60.0)
    verifier._pool = pool = Pool()
    first, second, third = await verifier.check_all(group("0@0", "slow"), group("0@0", "slow"), group("0@0", "2"))
    assert isinstance(third, tuple) and first != second
    pool.decided.set()
    assert await verifier.late(first) == await verifier.late(second) == third


def responses(*texts: str) -> Group:
    """A group whose rollouts decode to these texts."""
    spans, logp = (Span(version=0, start=0, end=1),), np.array([-1.0], np.float32)
    rollouts = tuple(
        Rollout(id=f"0@0#{at}", ids=np.array([at], np.int32), behaviour_logp=logp, spans=spans, truncated=False)
        for at in range(len(texts))
    )
    return Group(prompt=Prompt(id="0@0", ids=np.array([1], np.int32), answer="2"), rollouts=rollouts)


async def test_responses_vote_by_what_math_verify_holds_equal():
    texts = [
        r"\boxed{0.5}",
        r"\boxed{2}",
        r"\boxed{\frac{1}{2}}",
        "no idea",
        r"\boxed{7}",
        r"\boxed{4/2}",
        r"so \boxed{7}",
    ]
    verifier = GroupVerifier(VerifyConfig(), lambda ids: texts[ids[0]], within_s=60.0)
    await verifier.start()
    try:
        verdicts = await verifier.check(responses(*texts))
        said = await verifier.said(responses(*texts), verdicts)
    finally:
        await verifier._pool.close()
    assert [verdict.correct for verdict in verdicts] == [False, True, False, False, False, True, False]
    assert [one.vote for one in said] == [0, 1, 0, None, 4, 1, 4]
    assert [one.text for one in said] == texts


async def test_what_cannot_be_compared_in_time_votes_for_itself_and_equal_texts_still_vote_alike():
    class Hangs(Pool):
        async def check(self, check) -> Verdict:
            await self.decided.wait()

    verifier = GroupVerifier(VerifyConfig(), lambda ids: "", within_s=0.3)
    verifier._pool = Hangs()
    answers = [r"\boxed{1}", r"\boxed{3}", r"\boxed{1}", ""]
    verdicts = tuple(Verdict(id=f"{at}", correct=False, answer=answer) for at, answer in enumerate(answers))
    async with asyncio.timeout(0.3):
        said = await verifier.said(responses(*answers), verdicts)
    assert [one.vote for one in said] == [0, 1, 0, None]


async def test_a_check_that_reads_no_answer_gives_no_votes():
    verifier = GroupVerifier(VerifyConfig(check="code"), lambda ids: "", within_s=60.0)
    verdicts = (
        Verdict(id="0", correct=True),
        Verdict(id="1", correct=False),
        Verdict(id="2", correct=None, cause="late"),
    )
    assert [one.vote for one in await verifier.said(responses("", "", ""), verdicts)] == [None, None, None]
