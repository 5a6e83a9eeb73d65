"""The smallest ports: tokens, scores and steps are made up, versions and pauses are real."""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path

import numpy as np

from async_opd.stream.ledger import Ledger
from async_opd.stream.pool import Pool
from async_opd.stream.produce import Producer
from async_opd.wire import GroupMeta, Prompt, Rollout, Sampling, Span, StepResult, Verdict
from benchmarks.paced import Prompts

LOGP = np.array([-1.0, -2.0], np.float32)  # of the two tokens of every response


class FakeGenerator:
    """Answers every prompt with two tokens of its version."""

    def __init__(self, truncated: bool = False):
        self.version, self.paused, self.served, self.truncated = 0, False, [], truncated

    async def generate(self, prompt: Prompt):
        self.served.append(prompt)
        await asyncio.sleep(0)
        spans = (Span(version=self.version, start=0, end=2),)
        return GroupMeta(id=prompt.id, prompt_len=1, spans=(spans,), truncated=(self.truncated,)), prompt

    async def respond(self, prompt: Prompt, sampling: Sampling):
        return await self.generate(prompt)

    async def probe(self):
        spans = (Span(version=self.version, start=0, end=2),)
        ids = np.zeros(2, np.int32)
        return ids, Rollout(id="probe#0", ids=ids, behaviour_logp=LOGP, spans=spans, truncated=True)

    async def join_group(self, init_info): ...

    async def update(self, version, update_info, oldest):
        self.paused, self.version = True, version

    async def resume(self):
        self.paused = False

    async def check_health(self): ...

    def kill(self): ...


class FakeScorer:
    """Teacher and verifier in one: no scores, every response right."""

    async def score(self, group):
        return None

    async def check(self, group):
        return (Verdict(id=f"{group.id}#0", correct=True),)

    async def load(self, folder): ...

    async def check_health(self): ...

    def kill(self): ...


class FakeLearner:
    """Counts steps; agrees with the fake generator about log-probs."""

    def __init__(self):
        self.version, self.trained, self.saved = 0, [], []

    async def step(self, groups):
        self.trained += [ready.prompt.id for ready in groups]
        self.version += 1
        lags = [self.version - 1 - ready.meta.oldest for ready in groups]
        return StepResult(version=self.version, metrics={"tokens": 2.0 * len(groups), "lag_max": max(lags)})

    async def open_group(self, generators):
        return [{}] * generators

    async def join_group(self, generators): ...

    async def update_info(self):
        return {}

    async def send_weights(self): ...

    async def logprobs(self, prompt_ids, response_ids):
        return LOGP

    async def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.saved.append(folder)

    async def save_state(self, folder):
        Path(folder).mkdir()
        Path(folder, "version").write_text(str(self.version))

    async def load_state(self, folder):
        self.version = int(Path(folder, "version").read_text())


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time stands still while anything can run, then jumps to the next timer; `time.monotonic` is not involved."""

    def __init__(self):
        super().__init__()
        self._now, look = 0.0, self._selector.select

        def jump(timeout: float | None):
            assert timeout is not None, "everybody waits, and no timer is left"
            self._now += timeout
            return look(0)

        self._selector.select = jump

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor, func, *args):
        """Threads take no time."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def virtual(main: Coroutine):
    """Run `main` in virtual time; returns its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def prompts(count: int = 10**6):
    """Prompts "0", "1", … of one token."""
    return iter(Prompts(count))


def books() -> Ledger:
    """A ledger that nobody keeps."""
    with tempfile.TemporaryDirectory() as folder:
        return Ledger(Path(folder, "ledger.jsonl"))


def producer_over(world, generators: int = 1, **settings) -> Producer:
    """A producer for which `world` is every role: `generators` of one pool, teacher and verifier."""
    return Producer(
        prompts=prompts(),
        samples=1,
        generators=Pool("generator", [world] * generators),
        teachers={"": Pool("teacher", [world])},
        references=None,
        verifier=Pool("verifier", [world]),
        max_attempts=3,
        count_tokens=lambda role, tokens: None,
        ledger=books(),
        **settings,
    )
