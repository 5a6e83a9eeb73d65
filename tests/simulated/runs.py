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
from async_opd.config.precision import with_dtypes
from async_opd.config.schema import Config
from async_opd.core.aio import bounded
from async_opd.core.events import EventSink
from async_opd.core.ports import Generator, Teacher, Verifier
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
from async_opd.runtime.cluster import _timeouts
from async_opd.runtime.remote_role import RemoteRole
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
    in_actors: bool = False,
) -> Row:
    """One run of the real driver over one role of each kind; its rows go to `sinks`, what each
    actor did to `spans`.

    A role's own time for the work done between two moments is what it takes alone, never waiting:
    tokens made, groups scored or steps taken, times their set time. `of_longest` is the longest of
    the own times over the time that passed, without the steps at either edge. `in_actors` has the
    roles called as those of a real run are, with the bounds of the config.
    """
    settings = [
        f"run.steps={steps}",
        f"run.max_lag_steps={bound}",
        f"learner.trajectories_per_step={PER_STEP}",
        "run.dir=runs/simulated",
        "teacher.evaluate=false",
    ]
    config = with_dtypes(load(DEMO, [*settings, *overrides]), gpus=False)
    generator = SimulatedGenerator(pace, seed)
    teacher = SimulatedTeacher(pace)
    learner = SimulatedLearner(pace, bound)
    verifier = SimulatedVerifier(pace)

    def called(role: Any, name: str, port: type) -> Any:
        return port_over(role, name, port, config) if in_actors else role

    roles = Roles(
        generators=[called(generator, "generator 0", Generator)],
        teachers={"": [called(teacher, "teacher 0", Teacher)]},
        verifier=called(verifier, "verifier 0", Verifier),
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


class LocalActor:
    """`RemoteActor` without Ray: the actor is in this process. What is cancelled here is cancelled
    there."""

    def __init__(self, role: Any, name: str):
        self.name = name
        self._actor = acted(role)
        self._forgetting: set[asyncio.Task[None]] = set()

    async def call(self, timeout_s: float | None, method: str, *args: Any) -> Any:
        return await self.ask_host(timeout_s, "call", method, *args, what=method)

    async def call_keeping(
        self, timeout_s: float | None, refs: int, how: str, *args: Any, what: str = ""
    ) -> tuple[Any, list[Any]]:
        what = what or args[0]
        first, *rest = await self.ask_host(timeout_s, how, *args, what=what)
        return first, rest

    async def ask_host(
        self, timeout_s: float | None, method: str, *args: Any, what: str = ""
    ) -> Any:
        call = getattr(self._actor, method)(*args)
        who = f"{self.name}, {what or method}"
        return await (call if timeout_s is None else bounded(call, timeout_s, who))

    def forget(self, ticket: str) -> None:
        forgetting = asyncio.ensure_future(self._actor.forget(ticket))
        self._forgetting.add(forgetting)
        forgetting.add_done_callback(self._forgetting.discard)

    def kill(self) -> None:
        self._actor._role.kill()


def port_over(role: Any, name: str, port: type, config: Config) -> RemoteRole:
    """The port that a run has over the actor of `role`, bounded as `config` says."""
    return RemoteRole(LocalActor(role, name), port, _timeouts(config))


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
