import asyncio
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from async_opd.core.wire import Check, Group, Prompt, Rollout, Span, Verdict
from async_opd.roles.verifier.verifier import SHARE, GroupVerifier
from async_opd.runtime.actors import PATIENCE_S
from tests.simulated.runs import acted
from tests.simulated.virtual_time import virtual


def group(id: str, answer: str, responses: int = 1) -> Group:
    """Responses of one token each, 0, 1, …"""
    logp, spans = np.array([-1.0], np.float32), (Span(version=0, start=0, end=1),)
    rollouts = tuple(
        Rollout(
            id=f"{id}#{at}",
            ids=np.array([at], np.int32),
            behaviour_logp=logp,
            spans=spans,
            truncated=False,
        )
        for at in range(responses)
    )
    return Group(
        prompt=Prompt(id=id, ids=np.array([1], np.int32), answer=answer), rollouts=rollouts
    )


class Pool:
    """Decides at once, but for the answer "slow", which waits for `decided`."""

    def __init__(self):
        self.decided = asyncio.Event()

    async def check(self, check: Check) -> Verdict:
        if check.answer == "slow":
            await self.decided.wait()
        return Verdict(id=check.id, reward=1.0)


def verifier_of(pool, texts: Sequence[str] = ("",), within_s: float = 60.0) -> GroupVerifier:
    """Token 0 decodes to the first of `texts`, and so on."""
    return GroupVerifier(pool, lambda ids: texts[ids[0]], within_s)


def test_what_ends_a_response_is_none_of_what_it_says():
    class Keeps(Pool):
        async def check(self, check):
            said.append(check.response)
            return await super().check(check)

    said = []
    texts = ["B\nQuestion:", "B.\n\nQ", "B"]  # a token may hold more on both sides
    verifier = GroupVerifier(Keeps(), lambda ids: texts[ids[0]], 60.0, ("\nQuestion:", "\n\n"))
    asyncio.run(verifier.check(group("0@0", "B", responses=3)))
    assert said == ["B", "B.", "B"]


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_slow_check_does_not_hold_up_the_groups_beside_it():
    async def main():
        actor = acted(verifier_of(pool := Pool()))
        quick, slow = await actor.each("check", group("0@0", "2"), group("1@0", "slow"))
        assert quick == (Verdict(id="0@0#0", reward=1.0),) and isinstance(slow, str)
        assert now() == PATIENCE_S
        pool.decided.set()
        assert await actor.late(slow) == (Verdict(id="1@0#0", reward=1.0),)

    virtual(main())


def test_quick_checks_do_not_wait_at_all():
    async def main():
        groups = (group(f"{i}@0", "2") for i in range(5))
        assert len(await acted(verifier_of(Pool())).each("check", *groups)) == 5
        assert now() == 0

    virtual(main())


def test_what_no_worker_came_to_in_time_is_unknown_and_no_timeout_of_the_caller():
    async def main():
        async with asyncio.timeout(10):
            verdicts = await verifier_of(Pool(), within_s=10).check(group("0@0", "slow"))
        assert verdicts == (
            Verdict(id="0@0#0", reward=None, cause="no worker was free within 9.0 s"),
        )
        assert now() == SHARE * 10

    virtual(main())


def test_groups_that_share_an_id_each_get_their_own_verdicts():
    async def main():
        actor = acted(verifier_of(pool := Pool()))
        groups = group("0@0", "slow"), group("0@0", "slow"), group("0@0", "2")
        first, second, third = await actor.each("check", *groups)
        assert isinstance(third, tuple) and first != second
        pool.decided.set()
        assert await actor.late(first) == await actor.late(second) == third

    virtual(main())


async def test_responses_vote_by_what_math_holds_equal(start_pool: Callable):
    texts = [
        r"\boxed{0.5}",
        r"\boxed{2}",
        r"\boxed{\frac{1}{2}}",
        "no idea",
        r"\boxed{7}",
        r"\boxed{4/2}",
        r"so \boxed{7}",
    ]
    verifier = verifier_of(await start_pool(check="math", timeout_s=60.0), texts)
    asked = group("0@0", "2", responses=len(texts))
    verdicts = await verifier.check(asked)
    ballots = await verifier.ballots(asked, *verdicts)
    assert [verdict.correct for verdict in verdicts] == [
        False,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert [one.vote for one in ballots] == [0, 1, 0, None, 4, 1, 4]
    assert [one.text for one in ballots] == texts


def test_what_cannot_be_compared_in_time_votes_for_itself_and_equal_texts_still_vote_alike():
    class Hangs(Pool):
        async def check(self, check: Check) -> Verdict:
            await self.decided.wait()

    async def main():
        answers = [r"\boxed{1}", r"\boxed{3}", r"\boxed{1}", ""]
        verdicts = tuple(
            Verdict(id=f"{at}", reward=0.0, answer=answer) for at, answer in enumerate(answers)
        )
        verifier = verifier_of(Hangs(), answers, within_s=10)
        async with asyncio.timeout(10):
            ballots = await verifier.ballots(group("0@0", "2", responses=4), *verdicts)
        assert [one.vote for one in ballots] == [0, 1, 0, None]

    virtual(main())


async def test_a_check_that_reads_no_answer_gives_no_votes():
    verdicts = (
        Verdict(id="0", reward=1.0),
        Verdict(id="1", reward=0.0),
        Verdict(id="2", reward=None, cause="late"),
    )
    ballots = await verifier_of(Pool(), ["", "", ""]).ballots(
        group("0@0", "2", responses=3), *verdicts
    )
    assert [one.vote for one in ballots] == [None, None, None]


def test_a_response_that_has_failed_or_cannot_be_decoded_is_unknown_and_the_others_are_decided():
    one = group("0@0", "2", responses=3)  # of token 2 there is no text
    failed = msgspec.structs.replace(one.rollouts[1], failure="0@0#1: no log-prob")
    one = Group(one.prompt, (one.rollouts[0], failed, one.rollouts[2]))
    verdicts = virtual(verifier_of(Pool(), ("a", "b")).check(one))
    assert [verdict.correct for verdict in verdicts] == [True, None, None]
    assert [verdict.cause for verdict in verdicts] == [
        "",
        "0@0#1: no log-prob",
        "0@0#2: decoded: IndexError: tuple index out of range",
    ]


def test_groups_that_wait_for_minutes_behind_others_are_all_decided():
    class Serial(Pool):
        def __init__(self):
            super().__init__()
            self.turn = asyncio.Lock()

        async def check(self, check):
            async with self.turn:
                await asyncio.sleep(20.0)
            return await super().check(check)

    async def main():
        verifier = verifier_of(Serial(), within_s=60.0)
        found = await asyncio.gather(*(verifier.check(group(f"{n}", "x")) for n in range(20)))
        assert [verdict.correct for (verdict,) in found] == [True] * 20

    virtual(main())
