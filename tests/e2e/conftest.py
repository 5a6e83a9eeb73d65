"""The command line as a user runs it, and the processes it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import psutil
import pytest

from tests.processes import command_line

SMALL = (
    "teacher.evaluate=false",
    "eval.problems=16",
    "learner.trajectories_per_step=16",
    "learner.warmup_steps=0",
    "learner.schedule=constant",
    "learner.lr=5e-4",
)
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # gone by themselves within two minutes
T = TypeVar("T")


class Job:
    """One `async-opd` process, or of another program, in a session of its own, its descendants
    marked by an environment variable."""

    started: ClassVar[list["Job"]] = []

    def __init__(
        self,
        *args: str,
        folder: Path,
        program: tuple[str, ...] = ("-m", "async_opd"),
        env: Mapping[str, str] = {},
    ):
        self.started.append(self)
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{self.mark}.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *args],
                env=os.environ | env | {"ASYNC_OPD_TEST_MARK": self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a background shell ignores it
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait(self, timeout_s: float) -> int:
        """Exit status. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout_s)

    def text(self) -> str:
        return self.log.read_text()

    def until(self, happened: Callable[[], T], timeout_s: float = 240) -> T:
        """Wait until `happened` returns something true, and return it; fails with the job's log if
        it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not (outcome := happened()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)
        return outcome

    def processes(self, everything: bool = False) -> list[psutil.Process]:
        """Living processes of this job, Ray's own lingering agents apart unless `everything` is
        asked for."""
        return [
            process
            for process in psutil.process_iter(["environ", "status", "cmdline"])  # None: not ours
            if (process.info["environ"] or {}).get("ASYNC_OPD_TEST_MARK") == self.mark
            and process.info["status"] != psutil.STATUS_ZOMBIE
            and (everything or " ".join(process.info["cmdline"] or ()).strip() not in RAYS_OWN)
        ]

    def gone_within(self, seconds: float) -> list[str]:
        """Command lines of what is still there after `seconds`: empty when all went."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [" ".join(command_line(p))[:200] for p in left]

    def titled(self, name: str) -> list[psutil.Process]:
        """The processes whose title begins with `name`, the oldest first."""
        named = (p for p in self.processes() if " ".join(command_line(p)).startswith(name))
        return sorted(named, key=psutil.Process.create_time)


def demo(folder: Path, *overrides: str, steps: int = 4) -> Job:
    """The demo, small, with its run directory in `folder`."""
    return Job(
        "demo", f"run.dir={folder}/run", f"run.steps={steps}", *SMALL, *overrides, folder=folder
    )


def rows(run: Path) -> list[dict]:
    """Those of every step so far."""
    return _lines(run / "metrics.jsonl")


def events(run: Path) -> list[dict]:
    """What the driver told so far."""
    return _lines(run / "events.jsonl")


def wait_for_event(
    job: Job, run: Path, what: str, who: str, since: float = 0.0, timeout_s: float = 240
) -> dict:
    """The first event from the time `since` on of one whose name begins with `who`; fails with the
    job's log if it ends or takes too long."""

    def first() -> dict | None:
        of_them = (event for event in events(run) if event["who"].startswith(who))
        return next((e for e in of_them if e["what"] == what and e["time"] >= since), None)

    return job.until(first, timeout_s)


def _lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_steps(job: Job, run: Path, count: int, timeout_s: float = 240) -> None:
    """Wait until `count` steps are logged; fails with the job's log if it ends or takes too
    long."""
    job.until(lambda: len(rows(run)) >= count, timeout_s)


@pytest.fixture(autouse=True, scope="module")
def no_job_outlives_its_module() -> Iterator[None]:
    """Whatever tests that fail leave running is killed."""
    yield
    for job in Job.started:
        for process in job.processes():
            process.kill()
        job.process.wait(10)
    Job.started.clear()
