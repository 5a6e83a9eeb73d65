"""Phased teacher sampling, the second producer: which prompts the teacher answers itself, and which
of its answers are trained."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import floor

from async_opd.core.ports import Generator, ScoredGroup, Verifier
from async_opd.core.wire import Prompt
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import TEACHER, GroupFailed, Outcomes, blamed
from async_opd.driver.pools import Pools
from async_opd.driver.producer import unsound
from async_opd.driver.queue import TrajectoryQueue
from async_opd.roles.teacher.config import TeacherSamplingConfig

# why an answer is not trained
CAUSES = ("teacher_wrong", "teacher_unknown", "teacher_truncated", "teacher_late")


class TeacherSampling:
    """Gives a share of the prompts to the teacher's own generators while what they answer still has
    a weight.

    Its answers have no version, so they never age. Each request ends as a trained group or under
    one of CAUSES; then the student answers that prompt.
    """

    def __init__(
        self,
        sampling: TeacherSamplingConfig,
        pools: Pools,
        queue: TrajectoryQueue,
        tasks: asyncio.TaskGroup,
        *,
        version: Callable[[], int],
        keeps_truncated: bool,
        outcomes: Outcomes,
        ledger: Ledger,
    ):
        """`version()` is the live learner's. A right answer that was cut is trained only where
        `keeps_truncated`."""
        self._sampling = sampling
        self._pools = pools
        self._queue = queue
        self._tasks = tasks
        self._version = version
        self._keeps_truncated = keeps_truncated
        self._outcomes = outcomes
        self._ledger = ledger
        self._tickets: set[int] = set()  # of what the teacher was given and that is not trained yet
        self._admitted = 0
        self._requested = 0
        self._trained = 0

    def answers(self, ticket: int, prompt: Prompt) -> bool:
        """Decide for each prompt as it is admitted whether the teacher answers it; if so, begin.

        Every (1 / share)th in order of admission, while the next step that starts could train the
        answer."""
        share, before = self._sampling.share, self._admitted
        self._admitted += 1
        its_turn = floor(self._admitted * share) > floor(before * share)
        if not its_turn or not self._sampling.is_trained_at(self._version() + 1):
            return False
        self._requested += 1
        self._tickets.add(ticket)
        self._tasks.create_task(self._produce(ticket, prompt), name=f"produce {prompt.id}")
        return True

    def is_done_with(self, ticket: int) -> bool:
        """Whether a dropped group was the teacher's, whose prompt is the student's from now on."""
        was_its = ticket in self._tickets
        self._tickets.discard(ticket)
        return was_its

    async def _produce(self, ticket: int, prompt: Prompt) -> None:
        """Waits for the teacher's own generator, then for the verifier alone; `queue.put` unblocks
        the learner."""
        id, since = prompt.id, self._version()
        pools = self._pools
        try:
            with blamed(pools.teacher_generators.name):
                meta, group = await pools.teacher_generators.ask(
                    Generator.generate,
                    prompt,
                    of=id,
                    unsound=partial(unsound, id),
                    lost=partial(self._ledger.returned, id),
                )
            if why := "".join(meta.failures):  # of its one rollout
                raise GroupFailed(pools.teacher_generators.name, why)
            with blamed(pools.verifier.name):
                verdicts = await pools.verifier.ask(Verifier.check, group, of=id)
        except GroupFailed as e:
            self._outcomes.failed(prompt, e, by=TEACHER)
            self._queue.drop(ticket, prompt, 1, "failed")
            return
        self._outcomes.undecided.hear(verdicts)
        answer = ScoredGroup(
            ticket=ticket,
            prompt=prompt,
            meta=meta,
            group=group,
            scores=None,
            verdicts=verdicts,
            samples=(0,),
            since=since,
            from_teacher=True,
        )
        if cause := self._refuses(answer):
            self._outcomes.refused()
            self._queue.drop(ticket, prompt, 1, cause)
        else:
            self._outcomes.scored(prompt, cut=False, by=TEACHER)
            self._queue.put(answer)

    def _refuses(self, answer: ScoredGroup) -> str:
        """Why a verified answer is not trained; empty where it may be."""
        (verdict,), (truncated,) = answer.verdicts, answer.meta.truncated
        if not verdict.correct:
            return "teacher_unknown" if verdict.correct is None else "teacher_wrong"
        return "" if self._keeps_truncated or not truncated else "teacher_truncated"

    def row(
        self, step: int, batch: Sequence[ScoredGroup], dropped: Counter[str]
    ) -> dict[str, float]:
        """What optimizer step `step`, which trained `batch`, adds to its row of metrics; counts are
        totals so far."""
        trained = [group.ticket for group in batch if group.from_teacher]
        self._tickets.difference_update(trained)
        self._trained += len(trained)
        weight = self._sampling.weight(step)
        return {"taught": len(trained), "taught_weight": weight, **self.counts(dropped)}

    def counts(self, dropped: Counter[str]) -> dict[str, int]:
        """How many prompts the teacher was given, and what became of its answers."""
        causes = {f"dropped_{cause}": dropped[cause] for cause in CAUSES}
        return {"taught_requested": self._requested, "taught_trained": self._trained, **causes}
