"""A running job's pools are resized through its run directory."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from async_opd.config.load import load, load_run, read_run
from async_opd.core.errors import ConfigError, TimedOut
from async_opd.core.roles import Roles
from async_opd.driver import resize
from async_opd.driver.resume import fixed, refuse_changed
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Meter
from tests.simulated.roles import (
    Prompts,
    RecordingLearner,
    SimulatedGenerator,
    SimulatedTeacher,
    SimulatedVerifier,
)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(resize, "POLL_S", 0.02)


class Holds(RecordingLearner):
    """Trains until it is let go."""

    def __init__(self):
        super().__init__()
        self.go = asyncio.Event()

    async def step(self, groups):
        if self.version == 3:
            await self.go.wait()
        await asyncio.sleep(0.01)
        return await super().step(groups)


async def job(run_dir: Path, play, generators=None, urls=(), key=(), look=None):
    """Train in `run_dir` while `play(learner)` runs; returns what both leave behind. The teacher is
    the servers at `urls`, where there are any."""
    (run_dir / "config.json").write_text("{}")
    settings = [
        "run.steps=8",
        "learner.trajectories_per_step=4",
        "learner.warmup_steps=0",
        "teacher.evaluate=false",
        *(["teacher.backend=server", f"teacher.urls={json.dumps(urls)}"] if urls else []),
        *key,
    ]
    config = load("configs/demo.toml", settings)
    learner, started = Holds(), []

    async def spawn(name: str, which: int | str):
        started.append(f"{name} {which}")
        return SimulatedGenerator() if name == "generator" else SimulatedTeacher()

    roles = Roles(
        generators=generators or [SimulatedGenerator()],
        teachers={"": [SimulatedTeacher() for _ in urls or "1"]},
        verifier=SimulatedVerifier(),
        learner=learner,
        spawn=spawn,
        look=look,
    )
    running = asyncio.ensure_future(train(config, roles, Prompts(), [], run_dir, Meter([])))
    answers = await play(learner)
    learner.go.set()
    await running
    return answers, started, learner


async def asked(run_dir: Path, *words: str) -> str:
    return await asyncio.to_thread(resize.ask, run_dir, resize.parse(list(words)), 60.0)


async def test_pools_grow_and_shrink_while_the_job_trains_and_every_prompt_is_trained_once(
    tmp_path,
):
    async def play(learner):
        grown = await asked(tmp_path, "generators=3", "teacher=2")
        shrunk = await asked(tmp_path, "generators=1")
        return grown, shrunk

    (grown, shrunk), started, learner = await job(tmp_path, play)
    assert (grown, shrunk) == ("generators: 1 -> 3, teacher: 1 -> 2", "generators: 3 -> 1")
    assert sorted(started) == ["generator 1", "generator 2", "teacher 1"]
    assert len(learner.trained) == len(set(learner.trained)) == 32
    assert not list(tmp_path.glob("scale-*"))
    # what a resume begins with
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"rollout": {"generators": 1}, "teacher": {"replicas": 2}}


class Journal(SimulatedGenerator):
    """Writes down when it joins, takes weights and is killed; the update to version 2 waits."""

    def __init__(self, name: str, journal: list[str], go: asyncio.Event):
        super().__init__()
        self._name, self._journal, self._go = name, journal, go

    async def join_group(self, group):
        self._journal.append(f"{self._name} joins")

    async def update(self, version, layout, oldest):
        if version == 2:
            self._journal.append(f"{self._name} takes 2")
            await self._go.wait()
            await asyncio.sleep(0.1)
            self._journal.append(f"{self._name} has 2")
        await super().update(version, layout, oldest)

    def kill(self):
        self._journal.append(f"{self._name} killed")


@pytest.mark.parametrize(
    ("word", "behind", "started"),
    [
        ("generators=1", ["1 killed", "0 joins"], []),
        ("generators=3", ["0 joins", "1 joins"], ["generator 2"]),
    ],
)
async def test_a_size_that_is_asked_for_in_an_update_takes_effect_at_its_end(
    tmp_path, word, behind, started
):
    journal, go = [], asyncio.Event()

    async def play(learner):
        while journal[-2:] != ["0 takes 2", "1 takes 2"]:
            await asyncio.sleep(0.01)
        answer = await asked(tmp_path, word)
        await asyncio.sleep(0.1)
        go.set()
        return answer

    generators = [Journal(f"{index}", journal, go) for index in range(2)]
    answer, new, learner = await job(tmp_path, play, generators)
    begun = journal.index("1 takes 2")
    assert journal[begun + 1 : begun + 5] == ["0 has 2", "1 has 2", *behind]
    assert (answer, new) == (f"generators: 2 -> {word[-1]}", started)
    assert len(learner.trained) == len(set(learner.trained)) == 32


async def test_what_cannot_be_resized_is_refused_by_name_and_changes_nothing(tmp_path):
    async def play(learner):
        meant = r"scale = 'generator': must be 'teacher' or 'generators'; did you mean 'generators'"
        with pytest.raises(ConfigError, match=meant):
            await asked(tmp_path, "teacher=4", "generator=2")
        with pytest.raises(ConfigError, match="scale = 'learner': must be"):
            await asked(tmp_path, "learner=2")

    _, started, _ = await job(tmp_path, play)
    assert started == []


def test_with_no_job_there_is_no_answer_and_nothing_is_left(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TimedOut, match=r"no answer in 0\.2 s: no job is training in"):
        resize.ask(tmp_path, resize.parse(["generators=2"]), timeout_s=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


async def test_a_request_that_is_no_request_is_refused_and_taken_away(tmp_path):
    async def play(learner):
        (tmp_path / "scale-x.json").write_text('{"sizes": {"generators": "many"}}')
        while not (tmp_path / "scale-x.answer").exists():
            await asyncio.sleep(0.01)
        return (tmp_path / "scale-x.answer").read_text()

    answer, started, _ = await job(tmp_path, play)
    assert answer.startswith('[true,"Expected `int`, got `str`')
    assert started == []


A, B, C = "http://a:8000", "http://b:8000", "https://c/teacher"


async def test_servers_are_looked_at_and_added_and_dropped_while_the_job_trains(tmp_path):
    looked = []

    async def look(section: str, url: str):
        looked.append((section, url))

    async def play(learner):
        added = await asked(tmp_path, f"teacher.urls=+{B}/v1/")
        both = await asked(tmp_path, f"teacher.urls=+{C}", f"teacher.urls=-{A}", "generators=2")
        return added, both

    answers, started, learner = await job(tmp_path, play, urls=[A], look=look)
    assert answers == (
        f"teacher: {A} -> {A} {B}",
        f"generators: 1 -> 2, teacher: {A} {B} -> {B} {C}",
    )
    assert sorted(started) == ["generator 1", f"teacher {B}", f"teacher {C}"]
    assert looked == [("teacher", B), ("teacher", C)]
    assert len(learner.trained) == len(set(learner.trained)) == 32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"rollout": {"generators": 2}, "teacher": {"urls": [B, C]}}


async def test_a_change_of_servers_that_cannot_be_is_refused_whole(tmp_path):
    async def look(section: str, url: str):
        raise ConfigError(f"teacher.urls, {url}: serves another model")

    refused = {
        ("teacher=2",): "teacher=2: has a member for each of its servers: write teacher.urls=+URL",
        (f"teacher.urls=+{A}",): f"teacher.urls=+{A}: is there already",
        (f"teacher.urls=+{C}", f"teacher.urls=+{C}"): f"teacher.urls=+{C}: is there already",
        (f"teacher.urls=-{B}",): f"teacher.urls=-{B}: must be '{A}'",
        (f"teacher.urls=-{A}",): f"teacher.urls=-{A}: one server must be left",
        (f"teachers.x.urls=+{B}",): "scale = 'teachers.x.urls': must be 'teacher.urls'",
        (f"teacher.urls=+{B}",): "'http://b:8000': must be https",
        (f"teacher.urls=+{C}", "generators=2"): f"teacher.urls, {C}: serves another model",
    }

    async def play(learner):
        for words, why in refused.items():
            with pytest.raises(ConfigError) as error:
                await asked(tmp_path, *words)
            assert why in str(error.value)

    here = "http://localhost:8000"  # where a key may go unencrypted
    refused = {
        tuple(word.replace(A, here) for word in words): why.replace(A, here)
        for words, why in refused.items()
    }
    key = ["teacher.key_env=THEIR_KEY"]
    _, started, _ = await job(tmp_path, play, urls=[here], key=key, look=look)
    assert started == []
    assert json.loads((tmp_path / "config.json").read_text()) == {}


async def test_a_pool_that_asks_no_server_takes_none(tmp_path):
    async def play(learner):
        with pytest.raises(ConfigError, match="must be absent: none asks servers"):
            await asked(tmp_path, f"teacher.urls=+{B}")

    await job(tmp_path, play)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("teacher.urls=http://b:8000", r"write \+URL for a server more, -URL for one less"),
        ("teacher.urls=+b:8000", "it must be http://HOST:PORT"),
        ("teacher.urls=+http://me:Secret@b:1", "it must hold no user and no password"),
        ("teacher.urls=http://me:Secret@b:1", "teacher.urls='http://b:1': write"),
        ("teacher.urls=+https://b?key=Secret", "it must hold nothing behind a"),
        ("teacher.url=+http://me:Secret@b:1", "write POOL=NUMBER"),
    ],
)
def test_a_word_that_is_no_change_is_refused_before_anybody_is_asked(word, why):
    with pytest.raises(ConfigError, match=why) as refused:
        resize.parse(["generators=2", word])
    assert "Secret" not in str(refused.value)


def test_a_restart_and_a_resume_begin_with_the_servers_that_were_asked_for_or_with_others(tmp_path):
    settings = ["teacher.backend=server", f'teacher.urls=["{A}"]', f"run.dir={tmp_path}"]
    begun = load("configs/demo.toml", settings)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(begun))
    resize._keep(tmp_path, {}, {"teacher": [B, C]})
    assert read_run(tmp_path).teacher.members == (B, C)
    resumed = load_run(tmp_path, [f'teacher.urls=["{A}", "{C}"]'])
    assert resumed.teacher.members == (A, C)
    refuse_changed(resumed, fixed(begun), resumed.student.model)
    assert load_run(tmp_path, ["teacher.backend=vllm", "teacher.urls=[]"]).teacher.members == (0,)
