"""The main loop, over ports: it knows nothing of Ray, vLLM or DeepSpeed."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from async_opd import evaluate
from async_opd.config import Config
from async_opd.errors import LoopEnded
from async_opd.evaluate import Accuracy
from async_opd.maths import lag
from async_opd.metrics import Meter, Row
from async_opd.ports import Generator, Learner, Ready, Teacher, Verifier
from async_opd.stream.follow import Followers
from async_opd.stream.produce import Producer
from async_opd.stream.publish import Publisher
from async_opd.stream.queue import Slots, TrajectoryQueue
from async_opd.stream.supervise import first_cause, watch_health
from async_opd.stream.taught import CAUSES, Taught
from async_opd.stream.timed import TimedGenerator, TimedTeacher, TimedVerifier
from async_opd.wire import Prompt


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Every actor of a run, behind its port."""

    generators: Sequence[Generator]
    teachers: Mapping[str, Sequence[Teacher]]  # replicas by `Prompt.teacher`
    references: Sequence[Teacher] = ()  # replicas, where the objective needs a reference
    verifier: Verifier
    learner: Learner
    teacher_generators: Sequence[Generator] = ()  # they hold the teacher and answer the taught prompts


async def train(
    config: Config, roles: Roles, prompts: Iterator[Prompt], held_out: list[Prompt], run_dir: Path, meter: Meter
) -> dict[str, float | int | None]:
    """Run the whole job; returns what `summary.json` says of it. Raises the named error that ended it.

    On cancellation (Ctrl-C) the live weights are saved to `checkpoint` before it propagates.
    """
    roles = _timed(roles, meter)
    publisher = Publisher(
        roles.learner,
        roles.generators,
        parity_every=config.sync.parity_every_steps,
        tolerance=config.sync.parity_tolerance,
    )
    loop, engines = _Loop(config, roles, publisher, meter, run_dir), [*roles.generators, *roles.teacher_generators]
    try:
        async with asyncio.TaskGroup() as tasks:
            health = tasks.create_task(_never_ends(watch_health(engines, config.timeout.health_s)))
            await publisher.connect()
            await publisher.publish(0, admit=lambda: None)
            # The first tokens of an engine may take seconds; the student's have sampled some when training starts.
            warm = (generator.probe() for generator in roles.teacher_generators)
            before, *_ = await asyncio.gather(evaluate.of_generators(roles.generators, roles.verifier, held_out), *warm)
            await loop.run(prompts, tasks)
            found = await _evaluated(config, roles, held_out, before) if held_out else {}
            health.cancel()
        await roles.learner.save(str(run_dir / "checkpoint"))
    except BaseExceptionGroup as group:
        cause = first_cause(group)
        cause.add_note(f"at version {loop.version}")
        raise cause from None
    except asyncio.CancelledError:
        await roles.learner.save(str(run_dir / "checkpoint"))
        raise
    return {
        **found,
        **meter.summary(),
        "scored_dropped": sum(count for cause, count in loop.queue.dropped.items() if cause not in CAUSES),
        **{f"dropped_{cause}": count for cause, count in loop.queue.dropped.items()},
        **(loop.taught.counts(loop.queue.dropped) if loop.taught else {}),
    }


class _Loop:
    """Slots, queue, producer and the step loop of one run."""

    def __init__(self, config: Config, roles: Roles, publisher: Publisher, meter: Meter, run_dir: Path):
        self._config, self._roles, self._publisher, self._meter, self._dir = config, roles, publisher, meter, run_dir
        self._learner_time = meter.actor("learner")
        self.version = 0
        self._followers = _followers(config, roles, run_dir)
        self.taught = self._make_taught() if config.teacher_sampling else None
        self._slots = Slots(lag.slots(config.outstanding_steps, config.groups_per_step))
        self.queue = TrajectoryQueue(
            groups_per_step=config.groups_per_step,
            max_lag_steps=config.run.max_lag_steps,
            stale=config.run.stale,
            on_drop=lambda ready, cause: self._producer.dropped(ready, cause),
            wait_s=config.timeout.group_s,
            taught=self.taught,
            outstanding=self._outstanding,
        )

    async def run(self, prompts: Iterator[Prompt], tasks: asyncio.TaskGroup) -> None:
        """THE loop: take the oldest groups, train on them, publish the weights, give their slots back."""
        steps, every = self._config.run.steps, self._config.run.checkpoint_every_steps
        self._producer, learner_is = self._make_producer(prompts, tasks), self._learner_time.enter
        learner_is("syncing")
        self._meter.start()
        await self._publisher.publish(0, admit=lambda: self._admit([]))
        while self.version < steps:
            learner_is("starved")
            batch = await self.queue.take(self.version)
            learner_is("busy")
            result = await self._roles.learner.step(batch)
            self.version = result.version
            learner_is("blocked")
            await self._followers.follow(self.version)
            learner_is("syncing")
            gap = await self._publisher.publish(self.version, admit=lambda batch=batch: self._admit(batch))
            learner_is("blocked")
            self._meter.step(
                self.version, steps, result.metrics, **self._told(batch), parity_gap=gap, queue_ready=len(self.queue),
                queue_outstanding=self._slots.count - self._slots.free, dropped=self.queue.dropped.total(),
            )  # fmt: skip
            if every and self.version % every == 0:
                await self._roles.learner.save(str(self._dir / f"checkpoint-{self.version}"))

    def _admit(self, trained: list[Ready]) -> None:
        """Give the slots of the groups that were `trained` to the next prompts."""
        for ready in trained:
            self._slots.give_back(ready.ticket)
        self._producer.fill()
        if not self._producer.needed:
            for generator in self._roles.generators:
                generator.no_prompt_is_left()

    def _outstanding(self) -> str:
        """How many groups there are, and the calls that are out for them."""
        roles = self._roles
        scorers = [*chain(*roles.teachers.values()), *roles.references]
        out = {"generators": [*roles.generators, *roles.teacher_generators], "scorers": scorers}
        calls = (f"{sum(port.out for port in ports)} with {name}" for name, ports in out.items())
        held = self._slots.count - self._slots.free
        return f"{held} of at most {self._slots.count}, {', '.join(calls)}, {roles.verifier.out} with the verifier"

    def _told(self, batch: list[Ready]) -> Row:
        """What a row says of the step's groups."""
        taught = self.taught.row(self.version, batch, self.queue.dropped) if self.taught else {}
        return _verdicts(batch) | taught

    def _make_taught(self) -> Taught:
        sampling = self._config.teacher_sampling
        return Taught(
            share=sampling.share,
            weight=sampling.weight,
            generators=self._roles.teacher_generators,
            version=lambda: self.version,
            keeps_truncated=self._config.rollout.truncated == "train",
            outstanding=lambda: self._slots.count - self._slots.free,
        )

    def _make_producer(self, prompts: Iterator[Prompt], tasks: asyncio.TaskGroup) -> Producer:
        return Producer(
            prompts=prompts,
            needed=self._config.run.steps * self._config.groups_per_step,
            generators=self._roles.generators,
            teachers=self._roles.teachers,
            references=self._roles.references,
            verifier=self._roles.verifier,
            slots=self._slots,
            queue=self.queue,
            tasks=tasks,
            max_attempts=self._config.run.max_attempts,
            drop_truncated=self._config.rollout.truncated == "drop",
            count_tokens=self._meter.count,
            taught=self.taught,
        )


def _timed(roles: Roles, meter: Meter) -> Roles:
    return Roles(
        generators=[TimedGenerator(g, meter.actor("generators")) for g in roles.generators],
        teachers={
            name: [TimedTeacher(t, meter.actor("teachers")) for t in pool] for name, pool in roles.teachers.items()
        },
        references=[TimedTeacher(t, meter.actor("reference")) for t in roles.references],
        verifier=TimedVerifier(roles.verifier, meter.actor("verifier")),
        learner=roles.learner,
        teacher_generators=[
            TimedGenerator(g, meter.actor("teacher_generators"), "starved") for g in roles.teacher_generators
        ],
    )


def _followers(config: Config, roles: Roles, run_dir: Path) -> Followers:
    due: dict[int, list[Teacher]] = {}
    for name, teacher in config.named_teachers.items():
        if teacher.update != "frozen":
            due.setdefault(teacher.update_every_steps, []).extend(roles.teachers[name])
    return Followers(roles.learner, due, str(run_dir.resolve() / "self-teacher"))


async def _evaluated(config: Config, roles: Roles, held_out: list[Prompt], before: Accuracy) -> Row:
    """Accuracies for the summary. The teachers' come last: nobody waits for them, and their replicas are idle now."""
    after = await evaluate.of_generators(roles.generators, roles.verifier, held_out)
    teachers: Row = {}
    for name, teacher in config.named_teachers.items():
        own = [prompt for prompt in held_out if prompt.teacher == name] if teacher.evaluate else []
        found = await evaluate.of_teacher(roles.teachers[name][0], roles.verifier, own) if own else None
        teachers[f"teacher_accuracy_{name}" if name else "teacher_accuracy"] = found and found.share
    return {
        **teachers,
        "accuracy_before": before.share,
        "accuracy_after": after.share,
        "eval_problems": before.problems,
        "eval_unknown": before.unknown + after.unknown,
    }


def _verdicts(batch: list[Ready]) -> dict[str, float | int | None]:
    """Of the student's own rollouts: the teacher's are right, or they would not be here."""
    verdicts = [v.correct for ready in batch if not ready.prompt.taught for v in ready.verdicts]
    known, unknown = [correct for correct in verdicts if correct is not None], verdicts.count(None)
    return {"accuracy": sum(known) / len(known) if known else None, "verdicts_unknown": unknown}


async def _never_ends(loop) -> None:
    await loop
    raise LoopEnded("the health watch returned, though it should run for the whole job")
