"""The verifier pool as the driver sees it: whole groups of token ids in, verdicts out."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from async_opd.core.aio import until
from async_opd.core.errors import WireError
from async_opd.core.foreign import foreign
from async_opd.core.line import Line
from async_opd.core.wire import Ballot, Check, Group, Verdict
from async_opd.roles.verifier.pool import VerifierPool

SHARE = 0.9  # of the time that a caller waits, so that it hears of the verdict


class GroupVerifier:
    """Decodes responses and has each checked against its prompt's reference answer."""

    def __init__(
        self,
        pool: VerifierPool,
        decode: Callable[[np.ndarray], str],
        within_s: float,
        stops: Sequence[str] = (),
    ):
        """Keep `pool`, which decides; `within_s` is how long its caller waits for a verdict. A text
        of `stops` ends a response, and is none of what it says."""
        self._stops = stops
        self._pool = pool
        self._decode = decode
        self._within_s = SHARE * within_s
        self._line = Line()  # as its caller counts

    async def start(self) -> None:
        """Start the workers and wait until they are ready."""
        await self._pool.start()

    async def check(self, group: Group) -> tuple[Verdict, ...]:
        """Check each rollout of `group`, side by side; one that has failed is unknown."""
        with self._line.place(self._within_s, "check") as place:
            checks = (
                self._verdict(r.id, r.ids, group.prompt.answer, r.failure, place.due)
                for r in group.rollouts
            )
            return tuple(await asyncio.gather(*checks))

    async def ballots(self, group: Group, *verdicts: Verdict) -> tuple[Ballot, ...]:
        """Read what each rollout of `group` says and votes for. Right ones vote alike; wrong ones
        do where the check takes the one's answer for the other's. What cannot be compared in time
        votes for itself."""
        firsts: dict[str, int] = {}  # of each text, all right ones under ""
        votes: list[int | None] = [None] * len(verdicts)
        for index, verdict in enumerate(verdicts):
            if verdict.answer or (verdict.correct and verdict.answer is not None):
                votes[index] = firsts.setdefault("" if verdict.correct else verdict.answer, index)
        same: dict[int, int] = {}
        with suppress(TimeoutError), self._line.place(self._within_s, "ballots") as place:
            async with until(place.due):
                await self._compare(
                    group.prompt.id, {first: text for text, first in firsts.items() if text}, same
                )
        return tuple(
            Ballot(
                text=self._decode(rollout.ids), vote=None if vote is None else same.get(vote, vote)
            )
            for rollout, vote in zip(group.rollouts, votes, strict=True)
        )

    async def _compare(self, id: str, answers: dict[int, str], same: dict[int, int]) -> None:
        """Fill `same`: for each of `answers` the first that equals it."""
        for index, answer in answers.items():
            firsts = sorted(set(same.values()))
            verdicts = await asyncio.gather(
                *(
                    self._pool.check(Check(id=id, response=answer, answer=answers[first]))
                    for first in firsts
                )
            )
            same[index] = next(
                (first for first, verdict in zip(firsts, verdicts, strict=True) if verdict.correct),
                index,
            )

    def _said(self, ids: np.ndarray) -> str:
        text = self._decode(ids)
        places = [text.index(stop) for stop in self._stops if stop in text]
        return text[: min(places)] if places else text

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        """Check one response, as `check` does."""
        with self._line.place(self._within_s, "check_response") as place:
            return await self._verdict(id, ids, answer, "", place.due)

    async def _verdict(
        self, id: str, ids: np.ndarray, answer: str, failure: str, due: Callable[[], float]
    ) -> Verdict:
        """Check one response; unknown, where there was a `failure` before, where it cannot be
        decoded, or where the workers are too busy with others to decide until `due`."""
        if failure:
            return Verdict(id=id, reward=None, cause=failure)
        try:
            with foreign(f"{id}: decoded", WireError):
                response = self._said(ids)
            async with until(due):
                return await self._pool.check(Check(id=id, response=response, answer=answer))
        except WireError as e:
            return Verdict(id=id, reward=None, cause=f"{e}")
        except TimeoutError:
            return Verdict(
                id=id, reward=None, cause=f"no worker was free within {self._within_s:.1f} s"
            )
