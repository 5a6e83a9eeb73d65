"""What a resume goes on from, and what it refuses; over simulated roles."""

import json
from itertools import islice

import msgspec
import pytest
from msgspec.structs import replace

from async_opd.cli.train import read_alone, to_resume
from async_opd.config.load import load
from async_opd.core.errors import ActorLost, CheckpointError, ConfigError, RunInUse, TimedOut
from async_opd.core.roles import Roles
from async_opd.core.run_lock import locked
from async_opd.driver.checkpoints import find
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Jsonl, Meter
from async_opd.tools.audit.books import audit
from tests.simulated.roles import (
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual

HELD_OUT = [replace(each, id=f"held {n}") for n, each in enumerate(islice(Prompts(), 3))]
SMALL = (
    "run.steps=5",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "rollout.samples_per_prompt=1",
)


class Killed(BaseException):
    """Ends the loop, as a signal does."""


class Generator(SimulatedGenerator):
    """Raises `error` where it responds to a held-out problem of version 5."""

    def __init__(self, error: BaseException | None):
        super().__init__()
        self._error = error

    async def respond(self, prompt, sampling):
        if self.version == 5 and self._error:
            raise self._error
        return await super().respond(prompt, sampling)


class Teacher(SimulatedTeacher):
    """Raises `error` when it is measured."""

    def __init__(self, error: BaseException | None):
        super().__init__()
        self._error = error

    async def greedy(self, *prompts):
        if self._error:
            raise self._error
        return list(prompts)


class Verifier(SimulatedVerifier):
    async def check_response(self, id, ids, answer):
        (verdict,) = await self.check(replace(HELD_OUT[0], id=id))
        return verdict


def run(run_dir, *settings, error=None, teacher_error=None, checkpoint=None):
    """(summary, learner, events) of a run with held-out problems, as `launch.run` leaves it."""
    config = load("configs/demo.toml", [*SMALL, f"run.dir={run_dir}", *settings])
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.json").write_bytes(msgspec.json.encode(config))
    learner, events = RecordingLearner(), []
    roles = Roles(
        generators=[Generator(error)],
        teachers={"": [Teacher(teacher_error)]},
        verifier=Verifier(),
        learner=learner,
    )
    meter = Meter([Jsonl(run_dir / "metrics.jsonl")])
    summary = virtual(
        train(
            config,
            roles,
            Prompts(),
            HELD_OUT,
            run_dir,
            meter,
            lambda *event: events.append(event),
            checkpoint,
        )
    )
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return summary, learner, events


@pytest.mark.parametrize(
    ("setting", "has"),
    [
        ("learner.trajectories_per_step=8", "4"),
        ("rollout.samples_per_prompt=2", "1"),
        ("run.seed=7", "0"),
        ("data.id=name", "'id'"),
        ("data.streaming=true", "False"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_setting_that_a_run_has_for_good_is_refused_with_what_it_has(
    tmp_path, setting, has, recorded
):
    run(tmp_path, "run.steps=3")
    if recorded:  # whatever has become of the config since
        config = load("configs/demo.toml", [*SMALL, f"run.dir={tmp_path}", setting])
        (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
        words = ["run.steps=9"]
    else:
        state = tmp_path / "checkpoints" / "000003" / "run.json"
        old = msgspec.json.decode(state.read_bytes()) | {"fixed": {}}
        state.write_bytes(msgspec.json.encode(old))
        rewritten(tmp_path)
        words = ["run.steps=9", setting]
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError) as raised:
        to_resume(tmp_path, words)
    said = f"{raised.value}"
    assert said.replace("'", "").lower().startswith(f"{name} = {value}: must be")
    assert f"must be {has}, as the run has it" in said


ADAPTER = "student.lora={rank=8}"


@pytest.mark.parametrize(
    ("was", "changes", "line"),
    [
        ([], ["student.lora.rank=8"], "student.lora = {'rank': 8, 'alpha': 8.0, "),
        ([ADAPTER], ["student.lora.rank=16"], "student.lora = {'rank': 16, 'alpha': 16.0, "),
        ([ADAPTER], ["student.lora.alpha=4"], "student.lora = {'rank': 8, 'alpha': 4.0, "),
        ([ADAPTER], ["student.lora.dropout=0.1"], "student.lora = {'rank': 8, "),
        (
            [ADAPTER],
            ['student.lora.target_modules=["q_proj"]'],
            "student.lora = {'rank': 8, 'alpha': 8.0, 'dropout': 0.0, 'target_modules': ['q_pro",
        ),
        ([ADAPTER], ["student.model=toy:teacher"], "student.model = 'toy:teacher': must be 'toy:"),
    ],
)
def test_a_run_goes_on_with_its_adapter_and_the_model_beside_which_that_was_trained(
    tmp_path, was, changes, line
):
    run(tmp_path, "run.steps=3", *was)
    with pytest.raises(ConfigError) as raised:
        to_resume(tmp_path, ["run.steps=9", *changes])
    assert f"{raised.value}".startswith(line)
    assert "what is trained, and the optimizer's state of it, goes by it" in f"{raised.value}"
    same = ["student.lora.alpha=8"] if was else []  # what it is where it is absent
    to_resume(tmp_path, ["run.steps=9", *same])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("student.lora", [ADAPTER]),
        ("data.sources", ["data.path=''", "data.sources.a.path=toy:train"]),
    ],
)
def test_a_run_of_a_version_without_a_setting_goes_on_without_it(tmp_path, name, words):
    run(tmp_path, "run.steps=3")
    state = tmp_path / "checkpoints" / "000003" / "run.json"
    old = msgspec.json.decode(state.read_bytes())
    del old["fixed"][name]
    state.write_bytes(msgspec.json.encode(old))
    rewritten(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{name} = .*: must be absent, as the run has"):
        to_resume(tmp_path, ["run.steps=9", *words])
    to_resume(tmp_path, ["run.steps=9"])


def rewritten(run_dir) -> None:
    """Have the manifest of step 3 fit its run.json again."""
    import hashlib

    folder = run_dir / "checkpoints" / "000003"
    files = msgspec.json.decode((folder / "manifest.json").read_bytes())
    for file in files:
        content = (folder / file["name"]).read_bytes()
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(msgspec.json.encode(files))


def test_a_run_that_was_killed_in_its_last_evaluation_does_just_that_and_is_finished_then(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, error=Killed())
    assert not (tmp_path / "summary.json").exists() and not audit(tmp_path).finished
    _, checkpoint = to_resume(tmp_path, [])
    summary, learner, _ = run(tmp_path, checkpoint=checkpoint)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (1, 1)
    assert learner.trained == [] and summary["steps"] == 0
    books = audit(tmp_path)
    assert (books.discrepancies, books.finished, books.steps) == ([], True, 5)
    with pytest.raises(ConfigError) as raised:
        to_resume(tmp_path, [])
    said = f"{raised.value}"
    assert said.startswith("run.steps = 5: must be larger to go on") and "is of step 5" in said
    assert f"finished: {tmp_path / 'summary.json'}" in said


def test_a_checkpoint_of_more_steps_than_are_asked_for_is_refused_whatever_is_left(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, error=Killed())
    with pytest.raises(ConfigError, match=r"run.steps = 4: must be larger to go on"):
        to_resume(tmp_path, ["run.steps=4"])


@pytest.mark.parametrize("error", [TimedOut("generator 0: late"), ActorLost("generator 0 died")])
def test_a_last_evaluation_that_fails_is_null_and_an_event(tmp_path, error):
    summary, learner, events = run(tmp_path, error=error)
    assert summary["accuracy_after"] is None and summary["accuracy_before"] == 1
    assert len(learner.trained) == 20 and find(tmp_path).state.version == 5
    failed = [event for event in events if event[0] == "not evaluated"]
    what, who, why = failed[0]
    assert (what, who) == ("not evaluated", "version 5, the last") and why.startswith(str(error))
    books = audit(tmp_path)
    assert (books.discrepancies, books.finished) == ([], True)


def test_a_teacher_that_cannot_be_measured_leaves_the_students_accuracy(tmp_path):
    error = TimedOut("teacher 0: late")
    summary, _, events = run(tmp_path, "teacher.evaluate=true", teacher_error=error)
    assert (summary["accuracy_after"], summary["teacher_accuracy"]) == (1, None)
    (told,) = [event for event in events if event[0] == "not evaluated"]
    assert told[1] == "teacher" and told[2].endswith("teacher 0: late")
    summary, *_ = run(tmp_path / "again", "teacher.evaluate=true")
    assert summary["teacher_accuracy"] == 1


def test_a_run_at_work_is_read_by_no_resume(tmp_path):
    run(tmp_path)
    with locked(tmp_path, "train"):
        for path in (tmp_path, tmp_path / "checkpoints" / "000009"):  # it may be there by and by
            with pytest.raises(RunInUse, match=f"^{tmp_path}: train works in it"):
                read_alone(path, [])
    with pytest.raises(ConfigError, match=r"nothing|finished"):
        read_alone(tmp_path, [])


def test_another_run_directory_is_refused_and_not_passed_over(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ConfigError, match=f"^run.dir=new: a run goes on where it is, in {tmp_path}"
    ):
        to_resume(tmp_path, ["run.steps=9", "run.dir=new"])


def test_a_run_that_was_killed_before_its_first_checkpoint_is_to_be_started_as_before(tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="no complete checkpoint in ") as raised:
        to_resume(tmp_path, [])
    assert raised.value.__notes__ == [
        "it has saved none yet: start it as before, and this is kept beside it"
    ]


def test_a_run_that_goes_on_between_two_updates_has_its_weights_published_first(tmp_path):
    every = ("run.max_lag_steps=4", "sync.every_steps=3")
    run(tmp_path, *every)
    config = load("configs/demo.toml", [*SMALL, *every, "run.steps=11"])
    published: list[int] = []

    class Notes(SimulatedGenerator):
        async def update(self, version, layout, oldest):
            published.append(version)
            await super().update(version, layout, oldest)

    roles = Roles(
        generators=[Notes()],
        teachers={"": [Teacher(None)]},
        verifier=Verifier(),
        learner=RecordingLearner(),
    )
    summary = virtual(
        train(config, roles, Prompts(), [], tmp_path, Meter([]), checkpoint=find(tmp_path))
    )
    assert published == [5, 5, 6, 9, 11]
    assert summary["max_lag_seen"] <= 4 and len(roles.learner.trained) == 4 * 6
