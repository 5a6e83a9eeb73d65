"""What a disk that hangs does to a run, and what is asked of the disk on the event loop."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from async_opd.core import files
from async_opd.core.aside import aside
from async_opd.core.errors import TimedOut
from async_opd.driver import checkpoints
from tests.driver import disk_process

HANGS = {  # call and files: what the run ends by
    ("fsync", "ledger.jsonl"): "TimedOut; ledger, fsync: no answer in 1 s",
    ("mkdir", "checkpoints/.0"): "TimedOut; checkpoint of step 2: no answer in 1 s",
    ("fsync", "run.json"): "TimedOut; checkpoint of step 2: no answer in 1 s",
    ("rename", "checkpoints/.0"): "TimedOut; checkpoint of step 2: no answer in 1 s",
}


def started(folder: Path, *words: str) -> subprocess.Popen:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.driver.disk_process", str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All of them at once: each is half a minute of waiting at the most."""
    folder = tmp_path_factory.mktemp("disk")
    words = [*HANGS, ("watch",)]
    processes = {each: started(folder / f"{i}", *each) for i, each in enumerate(words)}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("hangs", HANGS, ids=" ".join)
def test_a_disk_that_hangs_ends_the_run_by_name_and_the_process_ends_too(runs, hangs):
    said, _ = runs[hangs].communicate(timeout=100)
    assert said.startswith(HANGS[hangs]), said
    assert runs[hangs].returncode == 0
    assert "Traceback" not in said


def test_nothing_is_asked_of_the_disk_on_the_event_loop(runs):
    said, _ = runs["watch",].communicate(timeout=100)
    assert runs["watch",].returncode == 0, said
    assert said.split("\n") == ["", ""], said


async def test_a_save_that_was_given_up_is_over_before_the_next_start_looks(tmp_path, monkeypatch):
    """Otherwise it would make a checkpoint behind the back of a run that went on from another."""
    release, rename = threading.Event(), files.rename

    def late(source, target):
        if target.name == "000002":
            release.wait(60)
        rename(source, target)

    monkeypatch.setattr(files, "rename", late)
    with pytest.raises(TimedOut, match="checkpoint of step 2"):
        await disk_process.run(tmp_path, 9)
    look = aside(60, "look", checkpoints.find, tmp_path, thread=checkpoints.thread_of(tmp_path))
    looking = asyncio.ensure_future(look)
    await asyncio.sleep(0.1)
    release.set()
    found = await looking
    assert found.state.version == 2
    await disk_process.run(tmp_path, 5, found)
    assert checkpoints.find(tmp_path).state.version == 5
