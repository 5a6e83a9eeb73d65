"""What an actor and its processes print is in a file of the run, and an error says where and how it
ends."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray import exceptions

from async_opd.cli import main as command
from async_opd.core.errors import ActorLost, CallFailed, ConfigError, SyncFailed, TimedOut
from async_opd.core.ports import Teacher
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.runtime import actor_log
from async_opd.runtime.actor_log import ActorLog, cause, printed, printed_in, shown, turn_over
from async_opd.runtime.actors import RemoteActor
from async_opd.runtime.remote_role import RemoteRole
from tests.runtime.test_actor_errors import task_error

ACTOR = """
import os, subprocess, sys
from pathlib import Path
from async_opd.runtime.actor_log import follow
follow(Path(sys.argv[1]), sys.argv[2])
print("a line", flush=True)
os.write(2, b"\\x1b[31mof C++\\x1b[0m\\n")
subprocess.run([sys.executable, "-c", "raise ValueError('in the core of an engine')"])
os._exit(9)
"""


def acted(log: ActorLog) -> str:
    """An actor with that log lives and dies; returns what it leaves on its own standard output."""
    command = [sys.executable, "-c", ACTOR, log.path, log.line]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


async def test_descriptors_and_child_processes_print_into_it_and_it_goes_on_behind_a_restart(
    tmp_path,
):
    first = ActorLog.begun(tmp_path / "logs", "generator 0")
    assert acted(first) == f"what follows is in {first.path}\n"
    assert first.path == f"{tmp_path}/logs/generator-0.log"
    second = ActorLog.begun(tmp_path / "logs", "generator 0")
    acted(second)
    for log in (first, second):
        words = await log.words()
        assert words == f"its output is in {log.path}: ValueError: in the core of an engine"
    with open(first.path) as file:
        lines = file.read().splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith("---- generator 0 starts, 20")]
    assert len(begins) == 2 and lines[begins[1] + 1].startswith("process ")
    assert lines[begins[1] + 2 : begins[1] + 4] == ["a line", "\x1b[31mof C++\x1b[0m"]
    assert printed(tmp_path / "logs" / "generator-0.log", second.line)[1:3] == [
        "a line",
        "of C++",
    ]


async def test_an_actor_with_another_disk_prints_where_it_did(tmp_path):
    log = ActorLog.begun(tmp_path, "teachers.math 1")
    elsewhere = tmp_path / "elsewhere.log"
    elsewhere.write_text("---- of another run\n")
    assert "a line" in acted(log._replace(path=f"{elsewhere}"))
    assert "a line" in acted(log._replace(path=f"{tmp_path}/none.log"))
    assert elsewhere.read_text() == "---- of another run\n"
    assert await log.words() == (
        "its output is in Ray's files on its node, worker-*.err among the logs of its session"
    )


async def test_a_disk_that_takes_no_log_keeps_nobody_from_starting(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    log = ActorLog.begun(tmp_path / "logs", "verifier 0")
    assert log.line == "" and "a line" in acted(log)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            [
                "(EngineCore pid=7) ERROR 11-30 [core.py:1] ValueError: No available memory",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed: {}",
            ],
            "ValueError: No available memory",
        ),
        (
            [
                "(EngineCore pid=7) ERROR 11-30 [core.py:1] ValueError: No available memory",
                *["  File somewhere, of a long trace"] * 50,
                "RuntimeError: Engine core initialization failed. See root cause above. Failed: {}",
            ],
            "ValueError: No available memory",
        ),
        (["ValueError: of long ago", *["a step"] * 50, "killed"], "killed"),
        (
            ["torch.OutOfMemoryError: CUDA out of memory.", "  (frames)"],
            "torch.OutOfMemoryError: C",
        ),
        (["warming up", "NCCL WARN unhandled system error"], "NCCL WARN unhandled system error"),
        ([], "it has printed nothing"),
    ],
)
def test_the_line_that_tells_the_cause(lines, says):
    assert cause(lines).startswith(says)


def test_what_a_terminal_would_show_is_shown():
    text = "\n".join(
        [*map(str, range(30)), " 5%|#  |\r99%|###|", "", "\x1b]0;title\x07bold\x1b[1m"]
    )
    assert shown(text) == [*map(str, range(30)), "99%|###|", "bold"]


def test_a_file_is_bounded_and_what_was_before_is_in_the_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(actor_log, "MOST_BYTES", 10)
    path = tmp_path / "generator-0.log"
    with path.open("ab", buffering=0) as file:  # as a process has it that goes on
        file.write(b"012345678\n")
        turn_over(path)
        file.write(b"a")
        turn_over(path)
    assert path.read_text() == "a"
    assert (tmp_path / "generator-0.earlier.log").read_text() == "012345678\n"


ERRORS = {
    "death": (exceptions.RayActorError(), ActorLost),
    "start": (task_error(ActorLost("teacher 0 cannot be built: RuntimeError: x")), ActorLost),
    "update": (task_error(SyncFailed("generator 0 did not take version 3: no")), SyncFailed),
    "foreign": (task_error(KeyError("x")), CallFailed),
    "silence": (KeyError("x"), TimedOut),
    "mistake": (task_error(ConfigError("model x: no")), ConfigError),
}


@pytest.mark.parametrize("which", ERRORS)
async def test_an_error_of_an_actor_names_its_log_in_one_line_and_the_command_shows_the_last_ones(
    which, tmp_path, capsys, monkeypatch
):
    error, kind = ERRORS[which]
    actor = object.__new__(RemoteActor)
    actor.name, actor._handle = "teacher 0", SimpleNamespace()
    monkeypatch.setattr(actor, "_unwanted", lambda cancel: None)
    actor.log = ActorLog.begun(tmp_path / "logs of it", "teacher 0")
    acted(actor.log)

    async def fails():
        if which == "silence":
            await asyncio.sleep(60)
        raise error

    with pytest.raises(kind) as raised:
        await actor._result(fails(), 0.05 if which == "silence" else 10, "start")
    said = f"{raised.value}"
    named = f"; its output is in {actor.log.path}: ValueError: in the core of an engine"
    assert said.endswith(named) is (which != "mistake") and "\n" not in said
    monkeypatch.setattr(command, "_printed", lambda words: (_ for _ in ()).throw(raised.value))
    assert command.main([]) == raised.value.exit_status
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"async-opd: {kind.__name__}: ")
    shows = [line.strip() for line in before]
    if which == "mistake":
        assert shows == []
    else:
        assert f"async-opd: the last lines of {actor.log.path}:" in shows
        assert "of C++" in shows and "ValueError: in the core of an engine" in shows


def test_members_of_two_names_have_two_logs(tmp_path):
    names = ("teachers.数学 0", "teachers.物理 0", "teachers.math-0 1", "teachers.math 0")
    assert len({ActorLog.begun(tmp_path, name).path for name in names}) == len(names)


async def test_a_member_that_gives_no_sign_of_life_is_lost_by_the_name_of_its_log(
    tmp_path, monkeypatch
):
    async def never() -> None:
        await asyncio.sleep(60)

    actor, events = object.__new__(RemoteActor), []
    hears = SimpleNamespace(remote=lambda *_: never())
    actor.name, actor._handle = "teacher 0", SimpleNamespace(check_health=hears)
    monkeypatch.setattr(actor, "_unwanted", lambda cancel: None)
    monkeypatch.setattr(actor, "kill", lambda: None)
    actor.log = ActorLog.begun(tmp_path, "teacher 0")
    acted(actor.log)
    within = dict.fromkeys(("score", "generate", "step", "stall"), 0.1)
    pool = ReplicaPool(
        "teacher",
        [RemoteRole(actor, Teacher, within)],
        emit=lambda what, who, why: events.append((what, why)),
    )
    async with asyncio.TaskGroup() as tasks:
        pool.start(tasks, every_s=0.01)
        while not events:
            await asyncio.sleep(0.01)
    (what, why), *_ = events
    assert (what, pool.lost) == ("lost", 1)
    assert why.startswith("teacher 0, sign of life: no answer in 0.1 s; its output is in ")
    assert why.endswith(f"{actor.log.path}: ValueError: in the core of an engine")


def test_a_log_that_is_gone_is_not_shown(tmp_path):
    assert printed_in(f"x; its output is in {tmp_path}/no.log: y (at version 3)") == []
