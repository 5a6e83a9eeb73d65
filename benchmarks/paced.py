"""What the driver costs: the real loop, slots, queue and publication over roles that take set times.

Steps of 16 trajectories. The longest role needs 0.25 s a step, the others the share of it that the regime says; 128
tokens a response, all alike or lognormal (sigma 1, at most 16 times the mean). One generator serves 16 requests at
once, a token of each every so often, and stands still during an update. The teacher takes what is queued, at most 8
groups at once, and needs a quarter of 0.25 s a step. An update takes 5 ms of generator and learner, a probe of 8 tokens
at every tenth. Time is wall time, the driver's CPU included.

A role's own time for the work done between two moments is what it takes alone, never waiting: tokens made, groups
scored or steps taken, times their set time. `of_longest` is the longest of the own times over the wall time; it leaves
out the first 5 steps, in which the pipeline fills, and the last 5, in which it runs empty.

    python benchmarks/paced.py --out FILE [--repeat 3]
"""

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from async_opd.commands.demo import CONFIG as DEMO
from async_opd.config import load
from async_opd.crew import Roles
from async_opd.metrics import Meter, Row, Sink
from async_opd.ports import Ready
from async_opd.train import train
from async_opd.wire import GroupMeta, Prompt, Rollout, Sampling, Span, StepResult, Verdict

STEPS, PER_STEP, EDGE, LONGEST_S, MEAN_TOKENS, PROBE_TOKENS = 45, 16, 5, 0.25, 128, 8
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
        return min(max(1, round(draw.lognormvariate(math.log(MEAN_TOKENS) - 0.5, 1.0))), 16 * MEAN_TOKENS)


def now() -> float:
    return asyncio.get_running_loop().time()


class Places:
    """So many at once; the others wait, in order but for those that go first."""

    def __init__(self, count: int):
        self._free, self._waiting = count, deque()

    @asynccontextmanager
    async def one(self, first: bool) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if first else self._waiting.append)(turn)
            try:
                await turn  # the place of one who leaves
            except asyncio.CancelledError:
                if not turn.cancelled():
                    self._leave()
                raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._waiting:
            if not (turn := self._waiting.popleft()).done():  # else it was cancelled
                turn.set_result(None)
                return
        self._free += 1


class PacedGenerator:
    """`concurrency` requests at once, first come, first served; all stand still from `update` to `resume`."""

    def __init__(self, pace: Pace, seed: int = 0):
        self._pace, self._draw, self._version, self.tokens = pace, random.Random(seed), 0, 0
        self._places = Places(pace.concurrency)
        self._running, self._halt = asyncio.Event(), asyncio.Event()
        self._running.set()

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Prompt]:
        return await self._respond(prompt, first=False)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Prompt]:
        """Goes before the requests of training."""
        return await self._respond(prompt, first=True)

    async def _respond(self, prompt: Prompt, first: bool) -> tuple[GroupMeta, Prompt]:
        async with self._places.one(first):
            spans = await self._sample(self._pace.tokens(self._draw))
        return GroupMeta(id=prompt.id, prompt_len=1, spans=(spans,), truncated=(False,)), prompt

    async def _sample(self, tokens: int) -> tuple[Span, ...]:
        spans, made, worked_s, token_s = [], 0, 0.0, self._pace.token_s
        while made < tokens:
            await self._running.wait()
            version, began = self._version, now()
            try:
                async with asyncio.timeout(tokens * token_s - worked_s):
                    await self._halt.wait()
                worked_s += now() - began
                at = min(int(worked_s / token_s), tokens)
            except TimeoutError:
                at = tokens
            if at > made:
                spans.append(Span(version=version, start=made, end=at))
            self.tokens += at - made
            made = at
        return tuple(spans)

    async def probe(self) -> tuple[np.ndarray, Rollout]:
        """Waits for no place: it goes before the requests that an update has put back in the engine's queue."""
        spans, ids = await self._sample(PROBE_TOKENS), np.zeros(PROBE_TOKENS, np.int32)
        return ids, Rollout(id="probe#0", ids=ids, behaviour_logp=LOGP, spans=spans, truncated=True)

    async def join_group(self, init_info: dict) -> None: ...

    async def update(self, version: int, update_info: dict, oldest: int) -> None:
        self._running.clear()
        self._halt.set()
        await asyncio.sleep(self._pace.sync_s)
        self._version = version

    async def resume(self) -> None:
        self._halt.clear()
        self._running.set()

    async def check_health(self) -> None: ...

    def kill(self) -> None: ...


class PacedTeacher:
    """Takes what is queued, at most `score_batch` groups at once, for `score_s` a group."""

    def __init__(self, pace: Pace):
        self._pace, self._free, self._queued, self.groups = pace, asyncio.Lock(), [], 0

    async def score(self, group: Prompt) -> None:
        scored = asyncio.Event()
        self._queued.append(scored)
        async with self._free:  # first come, first served: whoever gets it unscored is the first in the queue
            if not scored.is_set():
                batch, self._queued = self._queued[: self._pace.score_batch], self._queued[self._pace.score_batch :]
                await asyncio.sleep(self._pace.score_s * len(batch))
                self.groups += len(batch)
                for each in batch:
                    each.set()

    async def check_health(self) -> None: ...

    def kill(self) -> None: ...


class PacedVerifier:
    """As many checks at once as there are, `check_s` each."""

    def __init__(self, pace: Pace):
        self._pace = pace

    async def check(self, group: Prompt) -> tuple[Verdict, ...]:
        await asyncio.sleep(self._pace.check_s)
        return (Verdict(id=f"{group.id}#0", correct=True),)

    async def check_health(self) -> None: ...

    def kill(self) -> None: ...


class PacedLearner:
    """A step takes `step_s`; over-age tokens leave the loss and are counted, as in the real one."""

    def __init__(self, pace: Pace, max_lag_steps: int):
        self._pace, self._bound, self.version = pace, max_lag_steps, 0

    async def step(self, groups: list[Ready]) -> StepResult:
        await asyncio.sleep(self._pace.step_s)
        lags = {}
        for span in (span for ready in groups for span in ready.meta.spans[0]):
            lag = self.version - span.version
            lags[lag] = lags.get(lag, 0) + span.end - span.start
        trained = {lag: tokens for lag, tokens in lags.items() if lag <= self._bound}
        self.version += 1
        metrics = {"tokens": sum(trained.values()), "lag_max": max(trained)}
        metrics["lag_mean"] = sum(lag * tokens for lag, tokens in trained.items()) / metrics["tokens"]
        metrics["tokens_excluded"] = sum(lags.values()) - metrics["tokens"]
        return StepResult(version=self.version, metrics=metrics)

    async def open_group(self, generators: int) -> list[dict]:
        return [{}] * generators

    async def join_group(self, generators: int) -> None: ...

    async def update_info(self) -> dict:
        return {}

    async def send_weights(self) -> None:
        await asyncio.sleep(self._pace.sync_s)

    async def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        return LOGP

    async def save(self, folder: str) -> None:
        Path(folder).mkdir()

    async def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        Path(folder, "version").write_text(str(self.version))

    async def load_state(self, folder: str) -> None:
        self.version = int(Path(folder, "version").read_text())


class Prompts:
    """Prompts "0", "1", … of one token, which can be gone on with."""

    def __init__(self, count: int = 10**9):
        self._count, self.position = count, {"drawn": 0}

    def __iter__(self) -> Iterator[Prompt]:
        while (at := self.position["drawn"]) < self._count:
            self.position = {"drawn": at + 1}
            yield _prompt(f"{at}")

    def continued(self, position: dict, outstanding: Sequence[str]) -> Iterator[Prompt]:
        """Those that were `outstanding`, then those behind `position`."""
        self.position = position
        return chain(map(_prompt, outstanding), self)


def _prompt(id: str) -> Prompt:
    return Prompt(id=id, ids=np.zeros(1, np.int32), answer="")


async def measure(
    pace: Pace,
    *overrides: str,
    bound: int,
    steps: int = STEPS,
    seed: int = 0,
    sinks: Sequence[Sink] = (),
    spans: Sink | None = None,
) -> Row:
    """One run of the real driver over paced roles; its rows go to `sinks`, what each actor did to `spans`."""
    settings = (f"run.steps={steps}", f"run.max_lag_steps={bound}", f"learner.trajectories_per_step={PER_STEP}")
    config = load(DEMO, [*settings, "run.dir=runs/paced", "teacher.evaluate=false", *overrides])
    generator, teacher, learner = PacedGenerator(pace, seed), PacedTeacher(pace), PacedLearner(pace, bound)
    roles = Roles(generators=[generator], teachers={"": [teacher]}, verifier=PacedVerifier(pace), learner=learner)
    marks, excluded = {}, 0

    def mark(row: Row) -> None:
        nonlocal excluded
        own = (
            generator.tokens * pace.token_s / pace.concurrency,
            teacher.groups * pace.score_s,
            learner.version * pace.step_s,
        )
        marks[row["step"]] = np.array([now(), time.process_time(), *own])
        excluded += row["tokens_excluded"]

    meter = Meter([mark, *sinks], clock=asyncio.get_running_loop().time, spans=spans)
    with tempfile.TemporaryDirectory() as folder:
        summary = await train(config, roles, Prompts(), [], Path(folder), meter)
    meter.flush()
    wall_s, cpu_s, *own = (marks[steps - EDGE] - marks[EDGE]).tolist()
    longest = max(own)
    trajectories = (steps - 2 * EDGE) * PER_STEP
    return summary | {
        "trajectories_per_s": trajectories / wall_s,
        "longest": ("generation", "teacher", "learner")[own.index(longest)],
        "of_longest": longest / wall_s,
        "excluded_share": excluded / (excluded + summary["trained_tokens"]),
        "cpu_ms_per_trajectory": 1000 * cpu_s / trajectories,
    }


REGIMES = {"generation-bound": (1.0, 0.5), "balanced": (1.0, 1.0), "learner-bound": (0.5, 1.0)}
COLUMNS = (  # title, key, format; medians over the repetitions, except for the two counts: the largest
    ("traj/s", "trajectories_per_s", ".1f"),
    ("of longest", "of_longest", ".3f"),
    ("gen busy", "generators_busy", ".1%"),
    ("learn busy", "learner_busy", ".1%"),
    ("learn sync", "learner_syncing", ".1%"),
    ("over age", "excluded_share", ".1%"),
    ("max lag", "max_lag_seen", "d"),
    ("dropped", "scored_dropped", "d"),
    ("CPU ms/traj", "cpu_ms_per_trajectory", ".2f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of each setting, in turn")
    args = parser.parse_args()
    from async_opd.run import environment  # heavy, and the tests use the rest of this file

    settings = [
        (regime, bound, Pace.of(*shares, heavy_tail=heavy))
        for regime, shares in REGIMES.items()
        for heavy in (False, True)
        for bound in ((4, 0) if regime == "balanced" else (4,))
    ]
    rows = [{"regime": regime, "bound": bound, "pace": asdict(pace), "raw": []} for regime, bound, pace in settings]
    for repetition in range(args.repeat):
        for row, (_, bound, pace) in zip(rows, settings, strict=True):
            row["raw"].append(asyncio.run(measure(pace, bound=bound, seed=repetition)))
    print(
        f"{'regime':<17}{'lengths':<11}{'bound':>5}" + "".join(f"{title:>12}" for title, *_ in COLUMNS) + "  limited by"
    )
    for row in rows:
        for _, key, spec in COLUMNS:
            row[key] = (max if spec == "d" else statistics.median)(run[key] for run in row["raw"])
        row["limited_by"] = row["raw"][0]["longest"] if row["bound"] else "roles taking turns"
        lengths = "heavy tail" if row["pace"]["heavy_tail"] else "fixed"
        cells = "".join(f"{row[key]:>12{spec}}" for _, key, spec in COLUMNS)
        print(f"{row['regime']:<17}{lengths:<11}{row['bound']:>5}{cells}  {row['limited_by']}")
    balanced = [row for row in rows if row["regime"] == "balanced"]
    speeds = {(row["pace"]["heavy_tail"], row["bound"]): row["trajectories_per_s"] for row in balanced}
    over = {"fixed": speeds[False, 4] / speeds[False, 0], "heavy_tail": speeds[True, 4] / speeds[True, 0]}
    print(f"asynchronous over synchronous, balanced: {over['fixed']:.2f} fixed, {over['heavy_tail']:.2f} heavy tail")
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "processor": platform.processor()}
    found = {"async_over_sync": over, "rows": rows, "hardware": hardware, "python": platform.python_version()}
    args.out.write_text(json.dumps(found | environment(), indent=2))


if __name__ == "__main__":
    main()
