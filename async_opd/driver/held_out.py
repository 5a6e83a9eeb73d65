"""Greedy accuracy of a run on its held-out problems: before training, beside it, and after.

Beside training the generators that train respond, without a stop. The requests charge no slot. They
go before those of training, yet only as many at a time as SHARE of the engines' places: while an
evaluation runs training loses no more of its generation than that, and the evaluation is soon over.
Weights change meanwhile, so a row says which versions sampled the tokens; the evaluation has the
name of the one that was live when it began.
"""

import asyncio
from dataclasses import dataclass

from async_opd.config.schema import Config
from async_opd.core.errors import AsyncOpdError, CallFailed, first_line
from async_opd.core.events import EventSink
from async_opd.core.wire import Prompt, Verdict
from async_opd.driver.outcomes import Undecided
from async_opd.driver.pools import Pools
from async_opd.driver.respond import ALL, Accuracy, Responded, of_all, of_teacher, respond
from async_opd.telemetry.metrics import Row

SHARE = 0.25  # of the engines' places, beside training


@dataclass(frozen=True)
class Measured:
    """One evaluation."""

    accuracy: Accuracy
    version: int  # that was live when it began
    oldest: int  # version of its tokens
    newest: int
    tokens: float  # mean length of a response
    truncated: float  # share of the responses
    seconds: float

    def row(self) -> dict[str, float | int | None]:
        """What a row of metrics says of it."""
        return {
            "eval_accuracy": self.accuracy.share,
            "eval_unknown": self.accuracy.unknown,
            "eval_known": self.accuracy.known,
            "eval_version": self.version,
            "eval_version_min": self.oldest,
            "eval_version_max": self.newest,
            "eval_tokens": self.tokens,
            "eval_truncated": self.truncated,
            "eval_s": self.seconds,
        }


# a row to which no evaluation came
NONE: dict[str, float | int | None] = dict.fromkeys(Measured(Accuracy(0, 0, 1), *[0] * 6).row())


class HeldOut:
    """The evaluations of one run."""

    def __init__(self, config: Config, pools: Pools, problems: list[Prompt], emit: EventSink):
        self._config = config
        self._pools = pools
        self._problems = problems
        self._emit = emit
        self._every = config.eval.every_steps if config.eval and problems else 0
        self._due = self._every  # the version from which on the next is due
        self._undecided = Undecided(emit)
        self.before = Accuracy(0, 0, 0)
        self._running: asyncio.Task[None] | None = None
        self._ready: Measured | None = None  # for the next row
        self._skipped = 0

    async def begin(self, version: int, tasks: asyncio.TaskGroup) -> None:
        """Measure what is to be trained, unless that is known from before a restart. What comes
        later runs among `tasks`."""
        self._tasks = tasks
        if self._every:
            self._due = (version // self._every + 1) * self._every
        if self._problems and not self.before.problems:
            self._ready = await self._measure(version, ALL)
            self.before = self._ready.accuracy

    def published(self, version: int) -> None:
        """Evaluate `version`, which the generators hold, where it is the first at or behind a
        multiple of `eval.every_steps`, and the evaluation before has ended."""
        if not self._every or version < self._due or version == self._config.run.steps:
            return
        self._due = (version // self._every + 1) * self._every
        if self._running and not self._running.done():
            self._skip(version, "the one before still runs")
        else:
            self._running = self._tasks.create_task(
                self._beside(version), name=f"evaluate version {version}"
            )

    def row(self) -> dict[str, float | int | None]:
        """What the next row says: the evaluation that ended since the last, or that there was
        none."""
        if not self._every:
            return {}
        ready, self._ready = self._ready, None
        return (ready.row() if ready else NONE) | {"eval_skipped": self._skipped}

    async def end(self, version: int) -> Row:
        """Accuracies for the summary; None of what cannot be measured, which costs nothing that was
        trained. The teachers' come last: nobody waits for them, and they are idle now."""
        if self._running and not self._running.done():
            self._running.cancel()
            self._skipped += 1
        if not self._problems:
            return {}
        after: Accuracy | None = None
        try:
            after = (await self._measure(version, ALL)).accuracy
        except AsyncOpdError as e:
            self._failed(version, e)
        teachers: Row = {}
        for name, teacher in self._config.named_teachers.items():
            key = f"teacher_accuracy_{name}" if name else "teacher_accuracy"
            problems = [prompt for prompt in self._problems if prompt.teacher == name]
            teachers[key] = None
            if teacher.evaluate and problems:
                pool, verifier = self._pools.teachers[name], self._pools.verifier
                try:
                    teachers[key] = (await of_teacher(pool, verifier, problems)).share
                except AsyncOpdError as e:
                    self._emit("not evaluated", pool.name, f"{e}")
        return teachers | self._results(after)

    def unmeasured(self, version: int, why: AsyncOpdError) -> Row:
        """What the summary says where `end` was cut off by the loss of what it needs."""
        if not self._problems:
            return {}
        self._failed(version, why)
        names = self._config.named_teachers
        teachers = dict.fromkeys(
            f"teacher_accuracy_{n}" if n else "teacher_accuracy" for n in names
        )
        return teachers | self._results(None)

    def _results(self, after: Accuracy | None) -> Row:
        return {
            "accuracy_before": self.before.share,
            "accuracy_after": after and after.share,
            "eval_problems": self.before.problems,
            "eval_unknown": self.before.unknown + (after.unknown if after else 0),
            "eval_known": (self.before.known + after.known) / 2 if after else self.before.known,
            **({"eval_skipped": self._skipped} if self._every else {}),
        }

    def _failed(self, version: int, why: AsyncOpdError) -> None:
        self._emit("not evaluated", f"version {version}, the last", f"{why}")

    async def _beside(self, version: int) -> None:
        """An evaluation that fails costs training nothing."""
        try:
            self._ready = await self._measure(version, SHARE)
        except AsyncOpdError as e:
            self._skip(version, f"{e}")

    def _skip(self, version: int, why: str) -> None:
        self._skipped += 1
        self._emit("not evaluated", f"version {version}", why)

    async def _measure(self, version: int, share: float) -> Measured:
        generators, verifier = self._pools.generators, self._pools.verifier
        clock = asyncio.get_running_loop().time
        began = clock()

        async def one(prompt: Prompt) -> Responded:
            return await respond(generators, verifier, prompt)

        places = self._config.rollout.concurrency * generators.size
        most, at_once = self._config.run.max_failed_share, max(1, int(share * places))
        each_one = await of_all(self._problems, one, at_once, most)
        responded = [each for each in each_one if isinstance(each, Responded)]
        self._undecided.hear(each.verdicts[0] for each in responded)
        spans = [span for each in responded for span in each.meta.spans[0]]
        return Measured(
            accuracy=Accuracy.of(self._verdicts(version, each_one)),
            version=version,
            oldest=min(span.version for span in spans),
            newest=max(span.version for span in spans),
            tokens=sum(each.meta.lengths[0] for each in responded) / len(responded),
            truncated=sum(each.meta.truncated[0] for each in responded) / len(responded),
            seconds=clock() - began,
        )

    def _verdicts(self, version: int, each_one: list[Responded | CallFailed]) -> list[Verdict]:
        """The verdict on each response; on one that nobody gives, that it is unknown."""
        failed = [each for each in each_one if isinstance(each, CallFailed)]
        if failed:
            why = f"{len(failed)} of {len(each_one)} problems have no response and are unknown"
            who = f"evaluation of version {version}"
            self._emit("failed", who, f"{why}; the first: {first_line(failed[0])}")
        return [
            Verdict(id=prompt.id, reward=None, cause=first_line(each))
            if isinstance(each, CallFailed)
            else each.verdicts[0]
            for prompt, each in zip(self._problems, each_one, strict=True)
        ]
