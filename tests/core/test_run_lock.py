"""A run directory has one run, resume or evaluation at a time; a dead one leaves no hindrance."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from async_opd.core.errors import ConfigError, RunInUse
from async_opd.core.run_dir import LOCK
from async_opd.core.run_lock import locked

HOLD = """
import sys, time
from pathlib import Path
from async_opd.core.run_lock import locked
with locked(Path(sys.argv[1]), "train"):
    print("locked", flush=True)
    time.sleep(60)
"""
US = f"pid {os.getpid()} on host {socket.gethostname()}, since 2"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`/run."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_is_told_who_works_there_since_when(holder, tmp_path):
    who = rf"train works in it \(pid {holder.pid} on host {socket.gethostname()}, since \d{{4}}-"
    with pytest.raises(RunInUse, match=f"^{tmp_path}/run: {who}"), locked(tmp_path / "run", "eval"):
        pass
    assert RunInUse.exit_status == 2


def test_the_lock_follows_a_directory_that_is_renamed(holder, tmp_path):
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", "train"), pytest.raises(RunInUse, match=f"pid {holder.pid} "):
        locked(tmp_path / "elsewhere", "train").__enter__()


def test_the_lock_ends_with_the_process_that_holds_it_however_that_ends(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid
    with locked(tmp_path / "run", "train"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / LOCK).read_bytes() == b""


@pytest.mark.parametrize("left", [b"", b"{", b"\0" * 10_000, b'{"pid": 1, "host": "far"}'])
def test_whatever_a_dead_run_left_there_is_no_hindrance(left, tmp_path):
    (tmp_path / LOCK).write_bytes(left)
    with locked(tmp_path, "train"), pytest.raises(RunInUse, match=f"train works in it .{US}"):
        locked(tmp_path, "train").__enter__()
    with locked(tmp_path, "train"):
        pass


def test_no_child_keeps_the_lock(tmp_path):
    with locked(tmp_path, "train"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with locked(tmp_path, "train"):
        child.communicate(b"\n")


def test_what_is_moved_in_between_is_not_what_was_locked(tmp_path, monkeypatch):
    run, take = tmp_path / "run", fcntl.flock
    run.mkdir()

    def move_then_lock(descriptor, how):
        if not (tmp_path / "moved").exists():
            run.rename(tmp_path / "moved")
            run.mkdir()
        take(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", move_then_lock)
    with locked(run, "train"), locked(tmp_path / "moved", "train"):
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("make", ["mkdir", "fifo", "symlink"])
def test_what_cannot_be_a_lock_is_refused_by_its_name(make, tmp_path):
    lock = tmp_path / LOCK
    {"mkdir": lock.mkdir, "fifo": lambda: os.mkfifo(lock), "symlink": lambda: lock.symlink_to("x")}[
        make
    ]()
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be locked: {LOCK}: "):
        locked(tmp_path, "train").__enter__()


@pytest.fixture(params=["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def no_locks(request, monkeypatch):
    """A file system without locks."""

    def flock(descriptor, how):
        number = getattr(errno, request.param)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def written(folder, pid: int, host: str) -> None:
    holder = {"work": "train", "pid": pid, "host": host, "since": "2026-01-01 00:00:00+00:00"}
    (folder / LOCK).write_text(json.dumps(holder))


def test_a_file_system_without_locks_is_told_of_and_its_file_believed(no_locks, tmp_path, capsys):
    written(tmp_path, os.getppid(), socket.gethostname())
    with pytest.raises(RunInUse, match=rf"pid {os.getppid()} .*; if that is no longer so, delete "):
        locked(tmp_path, "train").__enter__()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid, host in ((dead.pid, socket.gethostname()), (os.getppid(), "far"), (-1, "far")):
        written(tmp_path, pid, host)
        with locked(tmp_path, "train"):
            pass
        line = capsys.readouterr().err
        assert line.startswith(f"warning: {tmp_path}: its file system has no locks (")
        assert line.count("\n") == 1 and f"(pid {pid} on host {host}, since 2026-" in line
    with locked(tmp_path, "train"):  # nobody is named by one that ended
        assert "says" not in capsys.readouterr().err
