"""The main loop, over ports: it knows nothing of Ray, vLLM or DeepSpeed. Who waits for whom, and
what unblocks it, is drawn in `async_opd.driver`."""

import asyncio
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

from async_opd.config.schema import Config
from async_opd.core.aio import bounded
from async_opd.core.errors import ActorLost, CheckpointError, ParityError, SyncFailed
from async_opd.core.events import EventSink
from async_opd.core.ports import Generator, ScoredGroup
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SELF_TEACHER
from async_opd.core.wire import Prompt
from async_opd.driver.admission import Admission, Supply
from async_opd.driver.checkpoints import Checkpoint
from async_opd.driver.filter import Filter
from async_opd.driver.held_out import HeldOut
from async_opd.driver.ledger import Ledger
from async_opd.driver.outcomes import Outcomes
from async_opd.driver.parity import Gap
from async_opd.driver.pools import Pools
from async_opd.driver.producer import Producer
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.read_ahead import ReadAhead
from async_opd.driver.replica import Replica
from async_opd.driver.respond import Accuracy
from async_opd.driver.resume import Progress, Source
from async_opd.driver.saving import AtWork, CheckpointClock, LearnerReplica
from async_opd.driver.self_teachers import SelfTeachers
from async_opd.driver.step_report import StepReport
from async_opd.driver.teacher_sampling import TeacherSampling
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.maths import lag
from async_opd.telemetry.metrics import Meter, Row


class TrainLoop:
    """The step loop of one run, over its pools, slots and queue."""

    async def run(self) -> None:
        """THE loop: take the oldest groups, train on them, publish the weights, give their slots
        back."""
        async with self._weights:
            await self._publish()
        while self.version < self._config.run.steps:
            batch = await self.queue.take(self.version)
            async with self._weights:
                await self.at_work.finish(self._step(batch))
                await self._self_teachers.follow(self.version)
                await self.pools.compare_beside(self.version)
                gap = await self._pass_on()
            updated = self._published == self.version
            self._report.write(gap, self._publisher.carried if updated else None)
            self.held_out.published(self._published)
            if self.version < self._config.run.steps and self._clock.due(self.version):
                await self.at_work.finish(self._try_to_save())
        await self.at_work.finish(self.save())

    def __init__(
        self,
        config: Config,
        roles: Roles,
        source: Source,
        held_out: list[Prompt],
        run_dir: Path,
        meter: Meter,
        emit: EventSink,
        ledger: Ledger,
    ):
        self._config, self._emit = config, emit
        self._meter = meter
        self._filter = Filter(config.data.filter, ledger) if config.data.filter else None
        self.prompts = ReadAhead(
            source, config.groups_per_step, config.timeout.step_s, self._filter
        )
        self._clock = CheckpointClock(config.run)
        self.version = 0
        self._published = 0  # version that the generators hold
        self._learner = LearnerReplica("learner", 0, roles.learner, meter.actor("learner"))
        self.pools = Pools(config, roles, meter, emit, self._welcome)
        self.held_out = HeldOut(config, self.pools, held_out, emit)
        self._publisher = WeightPublisher.of(
            config, self._learner, self.pools.generators, exact=roles.exact, emit=emit
        )
        self._weights = asyncio.Lock()  # taken while the learner's weights change or travel
        self._self_teachers = SelfTeachers(
            self._learner, self.pools.moving, run_dir.absolute() / SELF_TEACHER
        )
        self.progress = Progress(
            ledger, run_dir, self.prompts, self._learner, self._self_teachers, config, emit
        )
        self.at_work = AtWork()
        self._slots = Slots(lag.slots(config.outstanding_steps, config.groups_per_step))
        self.queue = TrajectoryQueue(
            groups_per_step=config.groups_per_step,
            max_lag_steps=config.run.max_lag_steps,
            stale=config.run.stale,
            on_drop=self._dropped,
            slots=self._slots,
            wait_s=config.timeout.group_s,
            teacher=config.teacher_sampling,
            where=self._where,
        )
        self.queue.answered = lambda: max(pool.answered for pool in self.pools)
        self._outcomes = Outcomes(config, self._slots.count, self.progress.ledger, emit)
        self._supply = Supply(self.prompts, self._slots, config.groups_per_step, emit)
        self._admission: Admission | None = None  # once training has started
        self._report = StepReport(
            config, meter, self._outcomes, self.queue, self._slots, self.held_out, self._filter
        )

    async def begin(self, tasks: asyncio.TaskGroup, checkpoint: Checkpoint | None) -> None:
        """Give every generator the student's weights, from `checkpoint` on where there is one, and
        measure what is to be trained."""
        if checkpoint:
            await self._restore(checkpoint)
        left = (self._config.run.steps - self.version) * self._config.groups_per_step
        await self._publisher.probe.prepare(self.prompts, self._config.rollout.max_new_tokens, left)
        await self._publisher.publish(self.version, admit=lambda: None)
        # The first tokens of an engine may take seconds; the student's have sampled some when
        # training starts.
        warming = (each.call(Generator.probe) for each in self.pools.teacher_generators.serving)
        self.pools.start(tasks)
        await asyncio.gather(self.held_out.begin(self.version, tasks), *warming)
        await self.pools.compare()
        self._admission = self._admits(tasks)
        self._clock.start()
        self._meter.start(self.version)

    def _admits(self, tasks: asyncio.TaskGroup) -> Admission:
        config, ledger = self._config, self.progress.ledger
        if config.teacher_sampling:
            self._report.teacher_sampling = TeacherSampling(
                config.teacher_sampling,
                self.pools,
                self.queue,
                tasks,
                version=lambda: self.version,
                keeps_truncated=config.rollout.truncated == "train",
                outcomes=self._outcomes,
                ledger=ledger,
            )
        student = Producer(
            self.pools,
            self.queue,
            tasks,
            rollout=config.rollout,
            outcomes=self._outcomes,
            ledger=ledger,
            count_tokens=self._meter.count,
        )
        return Admission(
            self._supply,
            (config.run.steps - self.version) * config.groups_per_step,
            slots=self._slots,
            ledger=ledger,
            max_attempts=config.run.max_attempts,
            student=student,
            teacher=self._report.teacher_sampling,
            ahead=partial(self.prompts.begin, tasks),
        )

    async def _step(self, batch: list[ScoredGroup]) -> None:
        result = await self._learner.step(batch)
        self.version = result.version
        self._outcomes.unscored(batch, result)
        self.progress.trained(self.version, batch)
        if self._filter:
            self._filter.trained(batch)
        self._report.trained(result, batch)
        self._slots.train(group.ticket for group in batch)

    async def _pass_on(self) -> Gap | None:
        """Publish, where that is due, and behind the last step; the ledger is on disk either
        way."""
        if self.version % self._config.sync.every_steps and self.version < self._config.run.steps:
            with self._learner.held("blocked"):
                await self.progress.synced()
            if self._supply.ended:  # what is outstanding fills the next step, or ends the run
                self._admit()
            return None
        return await self._publish()

    async def _publish(self) -> Gap | None:
        """Bring the generators to the live version and give the slots of the groups that were
        trained since the last time to the next prompts; the ledger is on disk, too. Returns the
        parity gap, where it was measured."""
        assert self._admission
        free = self._slots.count - self._slots.untrained
        await self.prompts.read(min(self._admission.needed, free))
        publishing = self._publisher.publish(self.version, admit=self._admit)
        with self._learner.held("syncing"):
            gap, _ = await asyncio.gather(publishing, self.progress.synced())
        self._published = self.version
        return gap

    def _admit(self) -> None:
        assert self._admission
        self._slots.publish()
        self._admission.fill()
        # generators without a request have nothing to come
        if self._supply.ended or not self._admission.needed:
            self.pools.generators.idles("starved")

    def _dropped(self, ticket: int, prompt: Prompt, cause: str) -> None:
        assert self._admission
        self._outcomes.dropped(prompt, cause)
        self._admission.dropped(ticket, prompt, cause)

    async def save_last(self) -> None:
        """Save what is trained, behind what is at work, while every learner rank answers; nothing,
        where nothing is trained since the newest checkpoint."""
        if self._admission is None:
            return
        await self.at_work.over()
        self._report.write()
        if self.version not in (0, self.progress.saved):
            sign = self._learner.hold(self._learner.port.weight_layout())
            await bounded(sign, self._config.timeout.stall_s, "learner, sign of life")
            await self.at_work.finish(self.save())

    async def _restore(self, checkpoint: Checkpoint) -> None:
        """Be where the run was at that checkpoint, with its prompts from there on."""
        state = checkpoint.state
        needed = (self._config.run.steps - state.version) * self._config.groups_per_step
        self.version = state.version
        await self.progress.restore(checkpoint, needed)
        if "before" in state.counters:
            self.held_out.before = Accuracy(*state.counters["before"])
        self.queue.dropped.update(state.counters.get("dropped", {}))
        self._outcomes.restore(state.counters.get("outcomes", {}))
        self._publisher.probe.parity.first = state.counters.get("parity")
        if self._filter:
            self._filter.restore(state.counters.get("filter", {}))

    async def _try_to_save(self) -> None:
        """Save a checkpoint on the way. What the disk refuses, full as it may be, is told; the next
        is another try."""
        try:
            await self.save()
        except CheckpointError as e:
            self._emit("not saved", "checkpoint", f"{e}; tried again at the next")

    async def save(self) -> None:
        """Save a checkpoint of the live version, which is in the books. The learner can do nothing
        else meanwhile."""
        async with self._weights:
            counters = {  # of the moment at which the books are taken
                "before": astuple(self.held_out.before),
                "dropped": dict(self.queue.dropped),
                "outcomes": self._outcomes.counts,
                "parity": self._publisher.probe.parity.first,
                **({"filter": self._filter.state} if self._filter else {}),
            }
            with self._learner.held("blocked"):
                await self.progress.save(self.version, counters)

    async def _welcome(self, newcomer: Replica[Generator]) -> None:
        """Bring a generator into the weight group, to the live version and through the probe.
        Raises ActorLost where that cannot be; the others then run on without it."""

        async def publish(newcomers: Sequence[Replica[Generator]] = ()) -> None:
            async with self._weights:
                await self._publisher.publish(self.version, lambda: None, newcomers)
                self._published = self.version

        try:
            await publish([newcomer])
        except (SyncFailed, ParityError) as e:
            newcomer.leave(str(e))
            await publish()
        if newcomer.lost:
            raise ActorLost(newcomer.lost)

    @property
    def is_over(self) -> bool:
        """Whether every step is trained, and saved."""
        return self.version == self._config.run.steps == self.progress.saved

    def summary(self) -> Row:
        """Counts of the whole run, for `summary.json`."""
        lost = {f"{pool.name}_lost": pool.lost for pool in self.pools if pool.lost}
        return self._report.totals() | lost

    def _where(self) -> str:
        """How many groups there are, and the calls that are out for them."""
        calls = ", ".join(f"{pool.out} with {pool.name}" for pool in self.pools)
        return f"{self._slots.outstanding} of at most {self._slots.count}, {calls}"
