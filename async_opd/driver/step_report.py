"""The row of metrics that each step has, once."""

from async_opd.config.schema import Config
from async_opd.core.ports import ScoredGroup
from async_opd.core.wire import StepResult
from async_opd.driver.filter import Filter
from async_opd.driver.held_out import HeldOut
from async_opd.driver.outcomes import Outcomes, verdicts
from async_opd.driver.parity import Gap, row
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.driver.teacher_sampling import CAUSES, TeacherSampling
from async_opd.telemetry.metrics import Meter, Row


class StepReport:
    """Holds what is known of the last step until its row is written."""

    def __init__(
        self,
        config: Config,
        meter: Meter,
        outcomes: Outcomes,
        queue: TrajectoryQueue,
        slots: Slots,
        held_out: HeldOut,
        filter: Filter | None,
    ):
        self._steps = config.run.steps
        self._sources = list(config.data.sources)
        self._meter, self._outcomes = meter, outcomes
        self._queue, self._slots = queue, slots
        self._held_out, self._filter = held_out, filter
        self.teacher_sampling: TeacherSampling | None = None  # once training has started
        self._unsaid: tuple[StepResult, list[ScoredGroup]] | None = None  # a step without a row

    def trained(self, result: StepResult, batch: list[ScoredGroup]) -> None:
        """Take what a step gave, of the groups in `batch`."""
        self._unsaid = result, batch
        for group in batch:
            if group.by_learner:
                scored = sum(group.meta.lengths[sample] for sample in group.samples)
                self._meter.count("teachers", scored)
        self._outcomes.trained(batch, result)

    def write(self, gap: Gap | None = None, carried: int | None = None) -> None:
        """Write the row of the last step, where it has none yet; `carried` are the bytes of the
        update behind it, where there was one."""
        if self._unsaid is None:
            return
        (result, batch), self._unsaid = self._unsaid, None
        dropped = self._queue.dropped
        sampled = (
            self.teacher_sampling.row(result.version, batch, dropped)
            if self.teacher_sampling
            else {}
        )
        self._meter.record(result.recorded)
        self._meter.step(
            result.version,
            self._steps,
            result.metrics,
            **verdicts(batch),
            **self._by_source(batch),
            **sampled,
            **row(gap),
            sync_bytes=carried,
            queue_ready=len(self._queue),
            queue_outstanding=self._slots.outstanding,
            queue_slots=self._slots.count,
            dropped=dropped.total(),
            **self._outcomes.counts,
            **(self._filter.counts if self._filter else {}),
            **self._held_out.row(),
        )

    def _by_source(self, batch: list[ScoredGroup]) -> Row:
        """What a row says of the groups of each source, where there are several."""
        row: Row = {}
        for name in self._sources:
            its = [group for group in batch if group.prompt.id.startswith(f"{name}:")]
            row[f"share_{name}"] = len(its) / len(batch)
            row[f"accuracy_{name}"] = verdicts(its)["accuracy"]
        return row

    def totals(self) -> Row:
        """Count what the whole run dropped and lost, for `summary.json`."""
        dropped = self._queue.dropped
        scored = sum(count for cause, count in dropped.items() if cause not in CAUSES)
        sampled = self.teacher_sampling.counts(dropped) if self.teacher_sampling else {}
        return {
            "scored_dropped": scored,
            **self._outcomes.counts,
            **(self._filter.counts if self._filter else {}),
            **{f"dropped_{cause}": count for cause, count in dropped.items()},
            **sampled,
        }
