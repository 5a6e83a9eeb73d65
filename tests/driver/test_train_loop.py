"""The main loop over simulated roles: no Ray, no engine, no model."""

import asyncio
import gc
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from async_opd.config.load import load
from async_opd.core.errors import ActorLost, CheckpointError, DataError
from async_opd.core.roles import Roles
from async_opd.core.weights import WeightLayout
from async_opd.core.wire import StepResult, Verdict
from async_opd.driver import checkpoints
from async_opd.driver.train import train
from async_opd.telemetry.metrics import ROLES, STATES, Jsonl, Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    AT_ONCE,
    Pace,
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

SMALL = (
    "run.steps=5",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "teacher.evaluate=false",
)


async def run(
    tmp_path,
    *overrides: str,
    generator=None,
    generators=None,
    learner=None,
    held_out=0,
    source=None,
    meter=None,
    **scorers,
):
    """(summary, learner, rows) of a whole run over simulated roles."""
    config = load("configs/demo.toml", [*SMALL, *overrides])
    learner, rows = learner or RecordingLearner(), []
    roles = Roles(
        generators=generators or [generator or SimulatedGenerator(), SimulatedGenerator()],
        learner=learner,
        **{"teachers": {"": [SimulatedTeacher()]}, "verifier": SimulatedVerifier()} | scorers,
    )
    meter = meter or Meter([rows.append], asyncio.get_running_loop().time)
    summary = await train(
        config, roles, source or Prompts(), list(Prompts(held_out)), tmp_path, meter
    )
    return summary, learner, rows


@pytest.mark.parametrize("bound", [0, 1, 4])
async def test_every_step_trains_its_groups_once_and_within_the_bound(tmp_path, bound):
    summary, learner, rows = await run(tmp_path, f"run.max_lag_steps={bound}")
    assert len(learner.trained) == len(set(learner.trained)) == 20  # 5 steps of 4
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert summary["max_lag_seen"] == max(row["lag_max"] for row in rows) <= bound
    assert summary["scored_dropped"] == 0
    assert learner.saved == [str(tmp_path / "checkpoints" / ".000005.partial" / "model")]
    assert checkpoints.find(tmp_path).state.version == 5


async def test_what_the_learner_records_reaches_the_recorder(tmp_path):
    class Recording(RecordingLearner):
        async def step(self, groups):
            result = await super().step(groups)
            return StepResult(
                result.version, result.metrics, recorded=(f"of step {result.version}",)
            )

    taken = []
    await run(tmp_path, learner=Recording(), meter=Meter([], record=taken.append))
    assert taken == [(f"of step {step}",) for step in (1, 2, 3, 4, 5)]


async def test_unknown_verdicts_make_no_checkpoint_the_best(tmp_path):
    class Hung(SimulatedVerifier):
        async def check(self, group):
            (verdict,) = await super().check(group)
            first = not checked
            checked.append(verdict)
            return (verdict if first else msgspec.structs.replace(verdict, reward=None),)

    checked = []
    await run(tmp_path, verifier=Hung())
    assert checkpoints.find(tmp_path).state.score == 1 / 20


async def test_accuracy_is_measured_before_and_after(tmp_path):
    summary, _, _ = await run(tmp_path, held_out=3)
    assert (summary["accuracy_before"], summary["accuracy_after"], summary["eval_problems"]) == (
        1.0,
        1.0,
        3,
    )


async def test_checkpoints_are_saved_on_the_way(tmp_path):
    _, learner, _ = await run(tmp_path, "run.checkpoint_every_steps=2")
    assert [Path(path).parent.name for path in learner.saved] == [
        ".000002.partial",
        ".000004.partial",
        ".000005.partial",
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000002",
        "000004",
        "000005",
    ]


async def test_a_row_that_cannot_be_used_ends_the_run_behind_a_checkpoint_before_it(tmp_path):
    class BadRow(Prompts):
        def __iter__(self):
            for prompt in super().__iter__():
                if prompt.id == "14":
                    self.position = {"drawn": 14}
                    raise DataError("row 14: 'answer' must be a string")
                yield prompt

    with pytest.raises(DataError, match="row 14: 'answer'") as raised:
        await run(tmp_path, "run.max_lag_steps=0", source=BadRow())
    (step,) = [int(note.removeprefix("at version ")) for note in raised.value.__notes__]
    state = checkpoints.find(tmp_path).state
    assert (state.version, state.position) == (step, {"drawn": 14}) and step == 3
    assert set(state.outstanding) <= {"12", "13"}


def test_a_checkpoint_blocks_the_learner(tmp_path):
    class SlowDisk(RecordingLearner):
        async def step(self, groups):
            await asyncio.sleep(1)
            return await super().step(groups)

        async def save(self, folder):
            await super().save(folder)
            await asyncio.sleep(3)

    summary, _, rows = virtual(run(tmp_path, "run.checkpoint_every_steps=1", learner=SlowDisk()))
    # until the last row
    assert summary["learner_blocked"] == pytest.approx(4 * 3 / (5 * 1 + 4 * 3))
    # the first is before a save
    assert [row["learner_blocked"] for row in rows] == pytest.approx([0, *[3 / 4] * 4])
    for row in (*rows, summary):
        for role in ROLES:
            assert sum(row[f"{role}_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)


async def test_a_self_teacher_follows_the_student_before_its_next_weights_are_published(tmp_path):
    class Follows(SimulatedTeacher):
        async def load(self, folder):
            loaded.append((folder, learner.version, generator.version))

        async def save(self, file):
            Path(file).write_text("its own weights")

    loaded, learner, generator = [], RecordingLearner(), SimulatedGenerator()
    settings = ("teacher.model=toy:student", "teacher.update=copy", "teacher.update_every_steps=2")
    await run(
        tmp_path,
        *settings,
        learner=learner,
        generator=generator,
        teachers={"": [Follows(), Follows()]},
    )
    folder = str(tmp_path / "self-teacher")
    # two replicas, at steps 2 and 4 of 5
    assert loaded == [(folder, 2, 1)] * 2 + [(folder, 4, 3)] * 2
    assert [path for path in learner.saved if path == folder] == [folder, folder]


async def test_teachers_are_measured_on_the_problems_of_their_own(tmp_path):
    class Asked(SimulatedTeacher, SimulatedVerifier):
        async def greedy(self, *prompts):
            asked.append(len(prompts))
            return list(prompts)

        async def check_response(self, id, ids, answer):
            return Verdict(id=id, reward=float(id == "0"))

    asked, both = [], Asked()
    toml = Path("configs/demo.toml").read_text().replace("[teacher]", "[teachers.math]")
    (tmp_path / "several.toml").write_text(toml)
    more = ("data.teacher=kind", "teachers.code.model=toy:student", "teachers.math.evaluate=true")
    config = load(tmp_path / "several.toml", [*SMALL[:3], *more])
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"math": [both], "code": [both]},
        verifier=both,
        learner=RecordingLearner(),
    )
    named = [
        msgspec.structs.replace(p, teacher=t)
        for p, t in zip(Prompts(3), ("math", "code", "math"), strict=True)
    ]

    class Code(Prompts):
        def __iter__(self):
            return (
                msgspec.structs.replace(prompt, teacher="code") for prompt in super().__iter__()
            )

    summary = await train(config, roles, Code(), named, tmp_path, Meter([]))
    assert asked == [2]
    assert (summary["teacher_accuracy_math"], summary["teacher_accuracy_code"]) == (0.5, None)


async def test_a_reference_has_times_of_its_own(tmp_path):
    summary, _, rows = await run(tmp_path, references=[SimulatedTeacher()])
    for row in (*rows, summary):
        assert sum(row[f"reference_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)
    (tmp_path / "without").mkdir()
    without, _, _ = await run(tmp_path / "without")
    assert "reference_busy" not in without


def test_nothing_grows_with_the_length_of_a_run(tmp_path):
    held = {}

    def look(row):
        if row["step"] % 10 == 0:
            gc.collect()
            held[row["step"]] = tracemalloc.get_traced_memory()[0]

    async def main():
        config = load("configs/demo.toml", [*SMALL, "run.steps=300"])
        roles = Roles(
            generators=[SimulatedGenerator()],
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
            learner=SimulatedLearner(replace(AT_ONCE, step_s=0.1)),
        )
        await train(
            config, roles, Prompts(), [], tmp_path, Meter([look], asyncio.get_running_loop().time)
        )

    tracemalloc.start()
    try:
        virtual(main())
    finally:
        tracemalloc.stop()
    # The event loop clears cancelled timers away a hundred at a time: what must not grow is the
    # most that is held.
    most = [max(held[step] for step in range(first, first + 100, 10)) for first in (110, 210)]
    assert most[1] - most[0] < 10_000  # bytes, in 100 steps of 4 groups; a row alone is 3,000


async def test_the_last_member_of_a_role_ends_the_run_with_its_error_and_the_version(tmp_path):
    class DiesLater(SimulatedGenerator):
        async def generate(self, prompt):
            if self.version == 2:
                raise ActorLost("generator 0 died")
            return await super().generate(prompt)

    with pytest.raises(ActorLost, match="generator 0 died") as failure:
        await run(tmp_path, "run.max_lag_steps=0", generators=[DiesLater(), DiesLater()])
    assert failure.value.__notes__ == ["at version 2"]


def test_a_dead_engine_of_the_teachers_own_ends_the_run_by_name(tmp_path):
    class Dead(SimulatedGenerator):
        async def generate(self, prompt):
            await asyncio.sleep(3600)

        async def check_health(self):
            raise ActorLost("teacher-generator 0: its engine died")

    sampling = {"share": 0.5, "full_until_step": 2, "until_step": 2}
    settings = [f"teacher_sampling.{key}={value}" for key, value in sampling.items()]
    with pytest.raises(ActorLost, match="teacher-generator 0: its engine died"):
        virtual(run(tmp_path, *settings, learner=Slow(step_s=1), teacher_generators=[Dead()]))


class Slow(RecordingLearner):
    """A step takes `step_s`; it dies in step `fatal`."""

    def __init__(self, step_s: float, fatal: int | None = None):
        super().__init__()
        self._step_s, self._fatal = step_s, fatal

    async def step(self, groups):
        await asyncio.sleep(self._step_s)
        if self.version + 1 == self._fatal:
            raise ActorLost("learner rank 0 died")
        return await super().step(groups)


def cancelled(
    tmp_path, step_s: float, fatal: int | None = None
) -> tuple[float, list[tuple[str, str, str]]]:
    """Cancel a run half a second into its second step; returns when it has ended, and what it told.
    The learner dies in step `fatal`."""

    async def main():
        told = []
        config = load("configs/demo.toml", [*SMALL])
        roles = Roles(
            generators=[SimulatedGenerator()],
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
            learner=Slow(step_s, fatal),
        )
        (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
        meter = Meter([Jsonl(tmp_path / "metrics.jsonl")], asyncio.get_running_loop().time)
        running = asyncio.ensure_future(
            train(config, roles, Prompts(), [], tmp_path, meter, lambda *event: told.append(event))
        )
        await asyncio.sleep(step_s + 0.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return asyncio.get_running_loop().time(), told

    return virtual(main())


def test_cancellation_lets_the_step_at_hand_finish_and_saves_it(tmp_path):
    assert cancelled(tmp_path, step_s=3) == (6, [("saved", "checkpoint", "step 2")])
    assert checkpoints.find(tmp_path).state.version == 2
    assert audit(tmp_path).discrepancies == []


def test_cancellation_stays_one_where_the_learner_dies_at_the_same_moment(tmp_path):
    ended, told = cancelled(tmp_path, step_s=3, fatal=2)
    assert (ended, told) == (6, [("not saved", "checkpoint", "learner rank 0 died")])


def test_cancellation_before_training_leaves_the_checkpoints_alone(tmp_path):
    class NeverLoads(RecordingLearner):
        async def load_state(self, folder):
            await asyncio.sleep(3600)

    async def main():
        config = load("configs/demo.toml", [*SMALL])
        roles = dict(
            generators=[SimulatedGenerator()],
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
        )
        await train(
            config, Roles(learner=RecordingLearner(), **roles), Prompts(), [], tmp_path, Meter([])
        )
        found = checkpoints.find(tmp_path)
        resumed = Roles(learner=NeverLoads(), **roles)
        running = asyncio.ensure_future(
            train(config, resumed, Prompts(), [], tmp_path, Meter([]), lambda *_: None, found)
        )
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    virtual(main())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000005"]


def gone_on_with(run_dir: Path, learner: RecordingLearner) -> None:
    """A run of five steps with a checkpoint at 2, which it goes back to with `learner`; ended after
    a second."""

    async def main():
        config = load("configs/demo.toml", [*SMALL, "run.checkpoint_every_steps=2"])
        (run_dir / "config.json").write_bytes(msgspec.json.encode(config))
        roles = dict(
            generators=[SimulatedGenerator()],
            teachers={"": [SimulatedTeacher()]},
            verifier=SimulatedVerifier(),
        )
        meter = Meter([Jsonl(run_dir / "metrics.jsonl")])
        summary = await train(
            config, Roles(learner=RecordingLearner(), **roles), Prompts(), [], run_dir, meter
        )
        (run_dir / "summary.json").write_text(json.dumps(summary))
        with (run_dir / "samples.jsonl").open("w") as file:
            for step in range(1, 6):
                file.write(json.dumps({"step": step, "id": f"{step}@0#0"}) + "\n")
        found = checkpoints.find(run_dir / "checkpoints" / "000002")
        again = train(
            config,
            Roles(learner=learner, **roles),
            Prompts(),
            [],
            run_dir,
            Meter([]),
            checkpoint=found,
        )
        running = asyncio.ensure_future(again)
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    virtual(main())


def test_a_run_that_goes_back_cuts_off_what_is_void(tmp_path):
    class Stuck(RecordingLearner):
        async def step(self, groups):
            await asyncio.sleep(3600)

    gone_on_with(tmp_path, Stuck())
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert [
            json.loads(line)["step"] for line in (tmp_path / file).read_text().splitlines()
        ] == [1, 2]
    assert not (tmp_path / "summary.json").exists()  # it was that of the run that had ended
    assert audit(tmp_path).discrepancies == []


def test_a_run_that_cannot_go_back_leaves_everything_as_it_was(tmp_path):
    class NeverLoads(RecordingLearner):
        async def load_state(self, folder):
            await asyncio.sleep(3600)

    gone_on_with(tmp_path, NeverLoads())
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert len((tmp_path / file).read_text().splitlines()) == 5
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5
    assert checkpoints.find(tmp_path).state.version == 5
    assert audit(tmp_path).discrepancies == []


def test_cancellation_does_not_wait_for_a_step_that_takes_too_long(tmp_path):
    ended, told = cancelled(tmp_path, step_s=60)
    assert (ended, [event[:2] for event in told]) == (60.5 + 18, [("not saved", "checkpoint")])
    with pytest.raises(CheckpointError):
        checkpoints.find(tmp_path)


@pytest.mark.parametrize("stale", ["mask", "drop"])
@pytest.mark.parametrize(("bound", "every"), [(1, 2), (4, 2), (4, 3), (4, 5)])
def test_with_weights_that_go_out_every_few_steps_the_bound_holds_and_the_last_are_published(
    tmp_path, stale, bound, every
):
    class Notes(SimulatedGenerator):
        async def update(self, version, layout, oldest):
            published.append(version)
            await super().update(version, layout, oldest)

    class Sends(RecordingLearner):
        async def weight_layout(self):
            return WeightLayout(("a",), ("float32",), ((2, 3),), nbytes=24)

    published, pace = [], Pace.of(1, 0.5)
    settings = [f"run.max_lag_steps={bound}", f"run.stale={stale}", f"sync.every_steps={every}"]
    summary, learner, rows = virtual(
        run(
            tmp_path,
            *settings,
            "run.steps=17",
            generators=[Notes(pace, 0)],
            learner=Sends(pace, bound),
            verifier=SimulatedVerifier(pace),
            teachers={"": [SimulatedTeacher(pace)]},
        )
    )
    updated = [row["step"] for row in rows if row["sync_bytes"] == 24]
    assert updated == published[2:]
    assert all(row["sync_bytes"] is None for row in rows if row["step"] not in updated)
    # 0 goes out to begin with, and as training starts
    assert published == [0, *range(0, 17, every), 17]
    assert every - 1 <= summary["max_lag_seen"] == max(row["lag_max"] for row in rows) <= bound
    assert len(learner.trained) == len(set(learner.trained)) == 17 * 4
    probed = [row["step"] for row in rows if row["parity_gap"] is not None]
    assert probed == [next(version for version in published if version >= 10)]


async def test_rows_that_end_between_two_updates_end_the_run_as_they_do_elsewhere(tmp_path):
    learner = RecordingLearner()
    with pytest.raises(DataError, match="its rows are used up"):
        await run(
            tmp_path,
            "run.steps=30",
            "run.max_lag_steps=4",
            "sync.every_steps=5",
            learner=learner,
            source=Prompts(4 * 12 + 2),
        )
    assert len(learner.trained) == 4 * 12
