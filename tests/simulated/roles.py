"""Every role of a run without a model: tokens, scores and steps are made up; versions, pauses and
times are real. Calls of a port that a role here leaves out do nothing.

A role takes the times that a `Pace` sets. At `AT_ONCE`, the default, it answers when the event loop
comes round.
"""

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from async_opd.core.ports import Generator, Learner, ScoredGroup, Teacher, Verifier
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import GroupMeta, Prompt, Rollout, Sampling, Span, StepResult, Verdict

PER_STEP = 16  # trajectories
LONGEST_S = 0.25  # what a step's work takes the longest role
MEAN_TOKENS = 128
PROBE_TOKENS = 8
# of the probe's tokens, by generator and learner alike
LOGP = np.full(PROBE_TOKENS, -1.0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Set times, in seconds, of one generator, teacher, verifier and learner."""

    token_s: float  # one token of each running request
    step_s: float
    concurrency: int = PER_STEP  # requests a generator runs at once
    heavy_tail: bool = False
    score_s: float = LONGEST_S / PER_STEP / 4  # one group
    score_batch: int = 8  # groups the teacher takes at once
    check_s: float = 0.005
    sync_s: float = 0.005

    @classmethod
    def of(cls, generation: float, learning: float, **more) -> "Pace":
        """A pace at which generation and learning take these shares of LONGEST_S a step."""
        concurrency = more.get("concurrency", cls.concurrency)
        token_s = generation * LONGEST_S * concurrency / (PER_STEP * MEAN_TOKENS)
        return cls(token_s=token_s, step_s=learning * LONGEST_S, **more)

    def tokens(self, draw: random.Random) -> int:
        """The length of one response."""
        if not self.heavy_tail:
            return MEAN_TOKENS
        return min(
            max(1, round(draw.lognormvariate(math.log(MEAN_TOKENS) - 0.5, 1.0))), 16 * MEAN_TOKENS
        )


AT_ONCE = Pace(token_s=0, step_s=0, score_s=0, check_s=0, sync_s=0)


class Places:
    """So many at once; the others wait, in order but for those that go first."""

    def __init__(self, count: int):
        self._free = count
        self._waiting: deque[asyncio.Event] = deque()

    @asynccontextmanager
    async def one(self, first: bool) -> AsyncIterator[None]:
        turn = asyncio.Event()
        (self._waiting.appendleft if first else self._waiting.append)(turn)
        self._admit()
        try:
            await turn.wait()
            yield
        finally:
            if turn.is_set():
                self._free += 1
                self._admit()
            else:  # cancelled before its turn
                self._waiting.remove(turn)

    def _admit(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().set()


class SimulatedGenerator(Generator):
    """`concurrency` requests at once, first come, first served; all stand still from `update` to
    `resume`.

    Every response is `truncated` or none is. `tokens` counts those it has made.
    """

    def __init__(self, pace: Pace = AT_ONCE, seed: int = 0, *, truncated: bool = False):
        self.pace, self.truncated = pace, truncated
        self.version = self.tokens = 0
        self._draw = random.Random(seed)
        self._places = Places(pace.concurrency)
        self._running = asyncio.Event()
        self._halt = asyncio.Event()
        self._running.set()

    @property
    def paused(self) -> bool:
        return not self._running.is_set()

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Prompt]:
        return await self._respond(prompt, first=False)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Prompt]:
        """Goes before the requests of training."""
        return await self._respond(prompt, first=True)

    async def _respond(self, prompt: Prompt, first: bool) -> tuple[GroupMeta, Prompt]:
        async with self._places.one(first):
            spans = await self._sample(self.pace.tokens(self._draw))
        return GroupMeta(
            id=prompt.id, prompt_len=1, spans=(spans,), truncated=(self.truncated,)
        ), prompt

    async def _sample(self, tokens: int) -> tuple[Span, ...]:
        token_s = self.pace.token_s
        if not token_s:
            await self._running.wait()
            await asyncio.sleep(0)
            self.tokens += tokens
            return (Span(version=self.version, start=0, end=tokens),)
        spans: list[Span] = []
        made, worked_s = 0, 0.0
        clock = asyncio.get_running_loop().time
        while made < tokens:
            await self._running.wait()
            version, began = self.version, clock()
            try:
                async with asyncio.timeout(tokens * token_s - worked_s):
                    await self._halt.wait()
                worked_s += clock() - began
                end = min(int(worked_s / token_s), tokens)
            except TimeoutError:
                end = tokens
            if end > made:
                spans.append(Span(version=version, start=made, end=end))
            self.tokens += end - made
            made = end
        return tuple(spans)

    async def probe(
        self, prompt: np.ndarray | None = None, tokens: int = PROBE_TOKENS
    ) -> tuple[np.ndarray, Rollout]:
        """Waits for no place: it goes before the requests that an update has put back in the
        engine's queue."""
        if prompt is None:
            prompt, tokens = np.zeros(1, np.int32), PROBE_TOKENS
        spans, ids = await self._sample(tokens), np.zeros(tokens, np.int32)
        logp = np.full(tokens, LOGP[0])
        return prompt, Rollout(
            id="probe#0", ids=ids, behaviour_logp=logp, spans=spans, truncated=True
        )

    async def update(self, version: int, layout: WeightLayout, oldest: int) -> None:
        self._running.clear()
        self._halt.set()
        await asyncio.sleep(self.pace.sync_s)
        self.version = version

    async def resume(self, expected: int) -> None:
        self._halt.clear()
        self._running.set()


class SimulatedTeacher(Teacher):
    """Takes what is queued, at most `score_batch` groups at once, for `score_s` a group. The scores
    of its one rollout are None. Every probe is answered by zeros."""

    def __init__(self, pace: Pace = AT_ONCE):
        self.pace, self.groups = pace, 0
        self._free = asyncio.Lock()
        self._queued: list[asyncio.Event] = []

    async def probe(self) -> np.ndarray:
        return np.zeros((1, 1), np.float32)

    async def score(self, group: Prompt) -> tuple[tuple[str, ...], None]:
        scored = asyncio.Event()
        self._queued.append(scored)
        # first come, first served: whoever gets it unscored is the first in the queue
        async with self._free:
            if not scored.is_set():
                batch, self._queued = (
                    self._queued[: self.pace.score_batch],
                    self._queued[self.pace.score_batch :],
                )
                await asyncio.sleep(self.pace.score_s * len(batch))
                self.groups += len(batch)
                for each in batch:
                    each.set()
        return ("",), None


class SimulatedVerifier(Verifier):
    """As many checks at once as there are, `check_s` each. Every response is right."""

    def __init__(self, pace: Pace = AT_ONCE):
        self.pace = pace

    async def check(self, group: Prompt) -> tuple[Verdict, ...]:
        await asyncio.sleep(self.pace.check_s)
        return (Verdict(id=f"{group.id}#0", reward=1.0),)


class SimulatedLearner(Learner):
    """A step takes `step_s`; tokens over the bound, where there is one, leave the loss and are
    counted."""

    def __init__(self, pace: Pace = AT_ONCE, max_lag_steps: int | None = None):
        self.pace, self.version = pace, 0
        self._bound = math.inf if max_lag_steps is None else max_lag_steps

    async def step(self, groups: Sequence[ScoredGroup]) -> StepResult:
        await asyncio.sleep(self.pace.step_s)
        lags: Counter[int] = Counter()
        sampled = [group for group in groups if not group.from_teacher]  # by the student
        for span in (span for group in sampled for span in group.meta.spans[0]):
            lags[self.version - span.version] += span.end - span.start
        trained = {lag: tokens for lag, tokens in lags.items() if lag <= self._bound}
        tokens = sum(trained.values())
        self.version += 1
        metrics = {
            "tokens": tokens,
            "lag_max": max(trained, default=0),
            "lag_mean": sum(lag * tokens for lag, tokens in trained.items()) / max(tokens, 1),
            "tokens_excluded": lags.total() - tokens,
        }
        return StepResult(version=self.version, metrics=metrics)

    async def open_group(self, generators: int) -> list[WeightGroup]:
        return [WeightGroup("localhost", 1, 1 + i, 1 + generators, 1, 1) for i in range(generators)]

    async def leave_group(self) -> None: ...

    async def weight_layout(self) -> WeightLayout:
        return WeightLayout((), (), ())

    async def send_weights(self) -> None:
        await asyncio.sleep(self.pace.sync_s)

    async def logprobs(self, *ids: np.ndarray) -> np.ndarray:
        return np.full(sum(map(len, ids[1::2])), LOGP[0])

    async def save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    async def save_whole(self, folder: str) -> None:
        await self.save(folder)

    async def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "version").write_text(str(self.version))

    async def load_state(self, folder: str) -> None:
        self.version = int(Path(folder, "version").read_text())


class RecordingLearner(SimulatedLearner):
    """Keeps the ids of what it trained, in order, and the folders that it saved weights to."""

    def __init__(self, pace: Pace = AT_ONCE, max_lag_steps: int | None = None):
        super().__init__(pace, max_lag_steps)
        self.trained: list[str] = []
        self.saved: list[str] = []

    async def step(self, groups: Sequence[ScoredGroup]) -> StepResult:
        result = await super().step(groups)
        self.trained += [group.prompt.id for group in groups]
        return result

    async def save(self, folder: str) -> None:
        await super().save(folder)
        self.saved.append(folder)


class Prompts:
    """Prompts "0", "1", … of one token, which can be gone on with."""

    def __init__(self, count: int = 10**9):
        self._count, self.position = count, {"drawn": 0}

    def __iter__(self) -> Iterator[Prompt]:
        while (drawn := self.position["drawn"]) < self._count:
            self.position = {"drawn": drawn + 1}
            yield _prompt(f"{drawn}")

    def continued(self, position: dict, outstanding: Sequence[str]) -> Iterator[Prompt]:
        """Those that were `outstanding`, then those behind `position`."""
        self.position = position
        return chain(map(_prompt, outstanding), self)


def _prompt(id: str) -> Prompt:
    return Prompt(id=id, ids=np.zeros(1, np.int32), answer="")
