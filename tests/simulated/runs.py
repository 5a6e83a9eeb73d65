"""The real driver, or its producer alone, over simulated roles."""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.roles import Roles
from async_opd.driver.ledger import Ledger
from async_opd.driver.producer import Producer
from async_opd.driver.replica_pool import Pool
from async_opd.driver.train_loop import train
from async_opd.telemetry.metrics import Meter, Row, Sink
from tests.simulated.roles import (
    PER_STEP,
    Pace,
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)

STEPS = 45
EDGE = 5  # first and last steps, in which the pipeline fills and runs empty
REGIMES = {"generation-bound": (1.0, 0.5), "balanced": (1.0, 1.0), "learner-bound": (0.5, 1.0)}


async def measure(
    pace: Pace,
    *overrides: str,
    bound: int,
    steps: int = STEPS,
    seed: int = 0,
    sinks: Sequence[Sink] = (),
    spans: Sink | None = None,
) -> Row:
    """One run of the real driver over one role of each kind; its rows go to `sinks`, what each
    actor did to `spans`.

    A role's own time for the work done between two moments is what it takes alone, never waiting:
    tokens made, groups scored or steps taken, times their set time. `of_longest` is the longest of
    the own times over the time that passed, without the steps at either edge.
    """
    settings = (
        f"run.steps={steps}",
        f"run.max_lag_steps={bound}",
        f"learner.trajectories_per_step={PER_STEP}",
    )
    config = load(DEMO, [*settings, "run.dir=runs/simulated", "teacher.evaluate=false", *overrides])
    generator = SimulatedGenerator(pace, seed)
    teacher = SimulatedTeacher(pace)
    learner = SimulatedLearner(pace, bound)
    roles = Roles(
        generators=[generator],
        teachers={"": [teacher]},
        verifier=SimulatedVerifier(pace),
        learner=learner,
    )
    clock = asyncio.get_running_loop().time
    marks, excluded = {}, 0

    def mark(row: Row) -> None:
        nonlocal excluded
        own = (
            generator.tokens * pace.token_s / pace.concurrency,
            teacher.groups * pace.score_s,
            learner.version * pace.step_s,
        )
        marks[row["step"]] = np.array([clock(), time.process_time(), *own])
        excluded += row["tokens_excluded"]

    meter = Meter([mark, *sinks], clock=clock, spans=spans)
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


def books() -> Ledger:
    """A ledger that nobody keeps."""
    with tempfile.TemporaryDirectory() as folder:
        return Ledger(Path(folder, "ledger.jsonl"))


def producer_over(world, generators: int = 1, **settings) -> Producer:
    """A producer for which `world` is every role: `generators` of one pool, teacher and
    verifier."""
    return Producer(
        prompts=iter(Prompts()),
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
