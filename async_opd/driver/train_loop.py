"""The main loop, over ports: it knows nothing of Ray, vLLM or DeepSpeed."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from async_opd.config.schema import Config
from async_opd.core.aio import bounded, first_cause, retrieved
from async_opd.core.errors import ActorLost, AsyncOpdError, ParityError, SyncFailed
from async_opd.core.events import Tell
from async_opd.core.ports import Generator, Learner, Ready, Teacher
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SELF_TEACHER
from async_opd.core.wire import Prompt, StepResult
from async_opd.driver import resize
from async_opd.driver.checkpoints import Checkpoint
from async_opd.driver.held_out import HeldOut
from async_opd.driver.pools import Crew
from async_opd.driver.producer import Producer
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.replica_pool import Pool, Seat
from async_opd.driver.respond import Accuracy
from async_opd.driver.resume import Progress, Source
from async_opd.driver.self_teachers import Followers
from async_opd.driver.teacher_sampling import CAUSES, Taught
from async_opd.driver.weight_publisher import Publisher
from async_opd.maths import lag
from async_opd.telemetry.metrics import Meter, Row

INTERRUPT_S = 18.0  # for the step at hand and a checkpoint, after Ctrl-C


async def train(
    config: Config,
    roles: Roles,
    source: Source,
    held_out: list[Prompt],
    run_dir: Path,
    meter: Meter,
    tell: Tell = lambda what, who, why: None,
    found: Checkpoint | None = None,
) -> Row:
    """Run the whole job, or from the checkpoint `found` on; returns what `summary.json` says of it.
    `tell` is told who was lost and who came. Raises the named error that ended it.

    On cancellation (Ctrl-C) a checkpoint is saved before it propagates.
    """
    loop = _Loop(config, roles, source, held_out, meter, run_dir, tell)
    crew = loop.crew
    try:
        async with asyncio.TaskGroup() as tasks:
            prompts = await loop.restore(found) if found else iter(source)
            await loop.publisher.publish(loop.version, admit=lambda: None)
            # The first tokens of an engine may take seconds; the student's have sampled some when
            # training starts.
            warm = (seat.hold(seat.port.probe()) for seat in crew.teacher_generators.serving)
            await asyncio.gather(loop.held_out.begin(loop.version), *warm)
            crew.start(tasks)
            serving = tasks.create_task(resize.serve(run_dir, crew))
            await loop.run(prompts, tasks)
            measured = await loop.held_out.end(loop.version)
            crew.stop()
            serving.cancel()
        loop.progress.ledger.finished()
    except BaseExceptionGroup as group:
        if asyncio.current_task().cancelling():  # something else broke at the same moment
            await loop.interrupted()
            raise asyncio.CancelledError from None
        await loop.settled()
        cause = first_cause(group)
        cause.add_note(f"at version {loop.version}")
        raise cause from None
    except asyncio.CancelledError:
        await loop.interrupted()
        raise
    finally:
        crew.stop()
        loop.progress.ledger.close()
    return {
        **measured,
        **meter.summary(),
        "scored_dropped": sum(
            count for cause, count in loop.queue.dropped.items() if cause not in CAUSES
        ),
        **{f"dropped_{cause}": count for cause, count in loop.queue.dropped.items()},
        **(loop.taught.counts(loop.queue.dropped) if loop.taught else {}),
        **{f"{pool.name}_lost": pool.lost for pool in crew if pool.lost},
    }


class _Loop:
    """Pools, slots, queue, producer and the step loop of one run."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        source: Source,
        held_out: list[Prompt],
        meter: Meter,
        run_dir: Path,
        tell: Tell,
    ):
        self._config = config
        self._learner = roles.learner
        self._meter = meter
        self._tell = tell
        self._learner_time = meter.actor("learner")
        self.version = 0
        self.crew = Crew(config, roles, meter, tell, self._welcome)
        self.held_out = HeldOut(config, self.crew, held_out, tell)
        self.publisher = Publisher(
            roles.learner,
            self.crew.generators,
            parity_every=config.sync.parity_every_steps,
            tolerance=config.sync.parity_tolerance,
            max_age=config.run.max_lag_steps if config.run.stale == "drop" else None,
        )
        self._weights = asyncio.Lock()  # held while the learner's weights change or travel
        self._followers = _followers(config, roles.learner, self.crew, run_dir)
        self.progress = Progress(
            run_dir, source, roles.learner, self._followers, config.run.keep_checkpoints, tell
        )
        self._at_work: asyncio.Future | None = None  # what an interruption lets finish
        self._producer: Producer | None = None  # once training has started
        self._unsaid: tuple[StepResult, list[Ready]] | None = None  # a step without a row yet
        self.taught = self._make_taught() if config.teacher_sampling else None
        self._slots = Slots(lag.slots(config.outstanding_steps, config.groups_per_step))
        self.queue = TrajectoryQueue(
            groups_per_step=config.groups_per_step,
            max_lag_steps=config.run.max_lag_steps,
            stale=config.run.stale,
            on_drop=lambda ticket, prompt, cause: self._producer.dropped(ticket, prompt, cause),
            wait_s=config.timeout.group_s,
            taught=self.taught,
            outstanding=self._outstanding,
        )

    async def run(self, prompts: Iterator[Prompt], tasks: asyncio.TaskGroup) -> None:
        """THE loop: take the oldest groups, train on them, publish the weights, give their slots
        back."""
        steps, every = self._config.run.steps, self._config.run.checkpoint_every_steps
        self._producer, learner_is = self._make_producer(prompts, tasks), self._learner_time.enter
        learner_is("syncing")
        self._meter.start(self.version)
        await self._publish(admit=lambda: self._admit([]))
        while self.version < steps:
            learner_is("starved")
            batch = await self.queue.take(self.version)
            async with self._weights:
                learner_is("busy")
                await self._finished(self._step(batch))
                learner_is("blocked")
                await self._followers.follow(self.version)
                learner_is("syncing")
                publishing = self.publisher.publish(
                    self.version, admit=lambda batch=batch: self._admit(batch)
                )
                syncing = bounded(
                    self.progress.ledger.sync(), self._config.timeout.step_s, "ledger, fsync"
                )
                gap, _ = await asyncio.gather(publishing, syncing)
            learner_is("blocked")
            self._say(gap)
            self.held_out.trained(self.version, tasks)
            if every and self.version % every == 0:
                await self._finished(self.save())
        await self._finished(self.save())

    async def _step(self, batch: list[Ready]) -> None:
        async with self._learner_time.call("step", tuple(ready.prompt.id for ready in batch)):
            result = await self._learner.step(batch)
        self.version = result.version
        self.progress.trained(self.version, batch)
        self._unsaid = result, batch

    def _say(self, gap: float | None = None) -> None:
        """The row of the last step."""
        (result, batch), self._unsaid = self._unsaid, None
        self._meter.record(result.recorded)
        self._meter.step(
            result.version,
            self._config.run.steps,
            result.metrics,
            **self._told(batch),
            parity_gap=gap,
            queue_ready=len(self.queue),
            queue_outstanding=self._slots.count - self._slots.free,
            queue_slots=self._slots.count,
            dropped=self.queue.dropped.total(),
            **self.held_out.row(),
        )

    async def _finished(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, which goes on where the caller is cancelled: `interrupted` and `settled`
        wait for it."""
        self._at_work = retrieved(asyncio.ensure_future(work))
        await asyncio.shield(self._at_work)

    async def interrupted(self) -> None:
        """A checkpoint of what is trained, if that can be had in INTERRUPT_S. Raises nothing of its
        own."""
        if self._producer is None:
            return  # nothing has been trained, or it is not restored yet
        try:
            async with asyncio.timeout(INTERRUPT_S):
                if self._at_work:
                    await asyncio.shield(self._at_work)
                if self._unsaid:
                    self._say()
                await self._finished(self.save())
        except TimeoutError:
            self._tell(
                "not saved",
                "checkpoint",
                f"the step at hand, or saving, takes more than {INTERRUPT_S:g} s",
            )
        except AsyncOpdError as e:
            self._tell("not saved", "checkpoint", f"{e}")

    async def settled(self) -> None:
        """Wait for what is still at work: a save that goes on behind the next start would be taken
        for its own."""
        if self._at_work:
            await asyncio.wait([self._at_work], timeout=self._config.timeout.step_s)

    async def restore(self, found: Checkpoint) -> Iterator[Prompt]:
        """Be where the run was at that checkpoint; returns its prompts from there on."""
        needed = (self._config.run.steps - found.state.version) * self._config.groups_per_step
        prompts, counters = await self.progress.restore(found, needed), found.state.counters
        self.version, self.held_out.before = found.state.version, Accuracy(*counters["before"])
        self.queue.dropped.update(counters["dropped"])
        return prompts

    async def save(self) -> None:
        """A checkpoint of the live version, which is in the books. The learner can do nothing else
        meanwhile."""
        before = astuple(self.held_out.before)
        async with self._weights, self._learner_time.call("checkpoint", self.version):
            await self.progress.save(
                self.version, {"before": before, "dropped": dict(self.queue.dropped)}
            )

    async def _publish(
        self, admit: Callable[[], None], newcomers: Sequence[Seat[Generator]] = ()
    ) -> None:
        async with self._weights:
            await self.publisher.publish(self.version, admit, newcomers)

    async def _welcome(self, seat: Seat[Generator]) -> None:
        """Bring a generator into the weight group, to the live version and through the probe.
        Raises ActorLost where that cannot be; the others then run on without it."""
        try:
            await self._publish(admit=lambda: None, newcomers=[seat])
        except (SyncFailed, ParityError) as e:
            seat.leave(str(e))
            await self._publish(admit=lambda: None)
        if seat.lost:
            raise ActorLost(seat.lost)

    def _admit(self, trained: list[Ready]) -> None:
        """Give the slots of the groups that were `trained` to the next prompts."""
        for ready in trained:
            self._slots.give_back(ready.ticket)
        self._producer.fill()
        if not self._producer.needed:
            self.crew.no_prompt_is_left()

    def _outstanding(self) -> str:
        """How many groups there are, and the calls that are out for them."""
        calls = (
            f"{sum(seat.port.out for seat in pool.serving)} with {pool.name}" for pool in self.crew
        )
        return (
            f"{self._slots.count - self._slots.free} of at most {self._slots.count},"
            f" {', '.join(calls)}"
        )

    def _told(self, batch: list[Ready]) -> Row:
        """What a row says of the step's groups."""
        taught = self.taught.row(self.version, batch, self.queue.dropped) if self.taught else {}
        return _verdicts(batch) | taught

    def _make_taught(self) -> Taught:
        sampling = self._config.teacher_sampling
        return Taught(
            share=sampling.share,
            weight=sampling.weight,
            generators=self.crew.teacher_generators,
            version=lambda: self.version,
            keeps_truncated=self._config.rollout.truncated == "train",
            outstanding=lambda: self._slots.count - self._slots.free,
        )

    def _make_producer(self, prompts: Iterator[Prompt], tasks: asyncio.TaskGroup) -> Producer:
        return Producer(
            prompts=prompts,
            needed=(self._config.run.steps - self.version) * self._config.groups_per_step,
            samples=self._config.rollout.samples_per_prompt,
            generators=self.crew.generators,
            teachers=self.crew.teachers,
            references=self.crew.references,
            verifier=self.crew.verifier,
            slots=self._slots,
            queue=self.queue,
            tasks=tasks,
            max_attempts=self._config.run.max_attempts,
            drop_truncated=self._config.rollout.truncated == "drop",
            count_tokens=self._meter.count,
            ledger=self.progress.ledger,
            taught=self.taught,
        )


def _followers(config: Config, learner: Learner, crew: Crew, run_dir: Path) -> Followers:
    due: dict[int, list[Pool[Teacher]]] = {}
    for name, teacher in config.named_teachers.items():
        if teacher.update != "frozen":
            due.setdefault(teacher.update_every_steps, []).append(crew.teachers[name])
    return Followers(learner, due, str(run_dir.resolve() / SELF_TEACHER))


def _verdicts(batch: list[Ready]) -> dict[str, float | int | None]:
    """Of the student's own rollouts: the teacher's are right, or they would not be here."""
    verdicts = [v.correct for ready in batch if not ready.prompt.taught for v in ready.verdicts]
    known, unknown = [correct for correct in verdicts if correct is not None], verdicts.count(None)
    return {"accuracy": sum(known) / len(known) if known else None, "verdicts_unknown": unknown}
