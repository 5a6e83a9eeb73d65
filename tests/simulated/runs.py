"""The real driver, or its producer alone, over simulated roles."""

import asyncio
import gc
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.events import EventSink
from async_opd.core.roles import Roles
from async_opd.core.wire import Prompt
from async_opd.driver.admission import Admission
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import Outcomes
from async_opd.driver.producer import Producer
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.replica import Replica
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.teacher_sampling import TeacherSampling
from async_opd.driver.train import train
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherSamplingConfig
from async_opd.runtime.actors import RoleActor
from async_opd.telemetry.metrics import Meter, Row, Sink
from async_opd.telemetry.spans import ActorTime
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
    settings = [
        f"run.steps={steps}",
        f"run.max_lag_steps={bound}",
        f"learner.trajectories_per_step={PER_STEP}",
        "run.dir=runs/simulated",
        "teacher.evaluate=false",
    ]
    config = load(DEMO, [*settings, *overrides])
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
    marks: dict[int, np.ndarray] = {}
    excluded: list[int] = []  # tokens, by step

    def mark(row: Row) -> None:
        own_s = (
            generator.tokens * pace.token_s / pace.concurrency,
            teacher.groups * pace.score_s,
            learner.version * pace.step_s,
        )
        marks[row["step"]] = np.array([clock(), time.process_time(), *own_s])
        excluded.append(row["tokens_excluded"])

    meter = Meter([mark, *sinks], clock=clock, spans=spans)
    with tempfile.TemporaryDirectory() as folder:
        summary = await train(config, roles, Prompts(), [], Path(folder), meter)
    meter.flush()
    wall_s, cpu_s, *own_s = (marks[steps - EDGE] - marks[EDGE]).tolist()
    longest = max(own_s)
    trajectories = (steps - 2 * EDGE) * PER_STEP
    return summary | {
        "trajectories_per_s": trajectories / wall_s,
        "longest": ("generation", "teacher", "learner")[own_s.index(longest)],
        "of_longest": longest / wall_s,
        "excluded_share": sum(excluded) / (sum(excluded) + summary["trained_tokens"]),
        "cpu_ms_per_trajectory": 1000 * cpu_s / trajectories,
    }


def replica(port: Any, name: str = "learner", index: int = 0) -> Replica[Any]:
    """One over a port of a test."""
    return Replica(name, index, port, ActorTime(time.monotonic))


def acted(role: Any) -> RoleActor:
    """The actor that plays `role`, in this process."""
    actor = RoleActor("types:SimpleNamespace", 0.0)
    gc.unfreeze()
    actor._role = role
    return actor


def books() -> Ledger:
    """A ledger that nobody keeps."""
    with tempfile.TemporaryDirectory() as folder:
        return Ledger(Path(folder, "ledger.jsonl"))


def pools_over(
    *,
    generators: Sequence[Any],
    teachers: Mapping[str, Sequence[Any]],
    verifier: Any,
    references: Sequence[Any] = (),
    teacher_generators: Sequence[Any] = (),
) -> Any:
    """What a producer needs of `Pools`, over ports of a test: nobody is watched or replaced."""
    return SimpleNamespace(
        generators=ReplicaPool("generator", generators),
        teachers={name: ReplicaPool("teacher", ports) for name, ports in teachers.items()},
        references=ReplicaPool("reference", references) if references else None,
        verifier=ReplicaPool("verifier", [verifier]),
        teacher_generators=ReplicaPool("teacher-generator", teacher_generators),
    )


def admission_over(
    tasks: asyncio.TaskGroup,
    pools: Any,
    *,
    slots: int,
    needed: int,
    queue: Mapping[str, Any],
    source: Iterable[Prompt] | None = None,
    truncated: str = "train",
    attempts: int = 3,
    sampling: TeacherSamplingConfig | None = None,
    emit: EventSink = lambda what, who, why: None,
    share: float = 1.0,
) -> tuple[Admission, TrajectoryQueue, Slots]:
    """Admission, queue and slots of a run, as the main loop has them, over `pools`; `queue` are
    settings of the queue's own, `share` is run.max_failed_share. The learner's version stays 0."""
    limit, ledger = Slots(slots), books()
    rollout = RolloutConfig(max_new_tokens=1, truncated=truncated)
    run: Any = SimpleNamespace(max_failed_share=share, max_lag_steps=0)
    config: Any = SimpleNamespace(
        groups_per_step=queue["groups_per_step"], run=run, rollout=rollout
    )
    outcomes = Outcomes(config, slots, ledger, emit)

    def dropped(ticket: int, prompt: Prompt, cause: str) -> None:
        outcomes.dropped(prompt, cause)
        admission.dropped(ticket, prompt, cause)

    ready = TrajectoryQueue(
        **queue,
        on_drop=dropped,
        slots=limit,
        wait_s=60.0,
        teacher=sampling,
    )
    student = Producer(
        pools,
        ready,
        tasks,
        rollout=rollout,
        outcomes=outcomes,
        ledger=ledger,
        count_tokens=lambda role, tokens: None,
    )
    teacher = sampling and TeacherSampling(
        sampling,
        pools,
        ready,
        tasks,
        version=lambda: 0,
        keeps_truncated=truncated == "train",
        outcomes=outcomes,
        ledger=ledger,
    )
    admission = Admission(
        iter(source or Prompts()),
        needed,
        slots=limit,
        ledger=ledger,
        max_attempts=attempts,
        student=student,
        teacher=teacher,
    )
    return admission, ready, limit
