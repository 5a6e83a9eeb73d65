"""A real job to hurt: who its processes are, what it says of them, and what its books say in the
end."""

import os
import signal
import time
from pathlib import Path

import psutil

from async_opd.tools.audit.books import Books, audit
from tests.e2e.conftest import Job, demo, rows, wait_for_event, wait_for_steps

TITLES = {
    "generator": "ray::Generator",
    "teacher": "ray::Teacher",
    "verifier": "ray::Verifier",
    "learner": "ray::Learner",
}


class Hurt:
    """A demo that trains for ever in `folder`."""

    def __init__(self, folder: Path, *overrides: str, steps: int = 100_000):
        self.run_dir = folder / "run"
        self.job = demo(folder, *overrides, steps=steps)

    def resume(self, folder: Path, *overrides: str) -> None:
        """Go on with the run in a new job."""
        self.job = Job("train", "--resume", str(self.run_dir), *overrides, folder=folder)

    def pids(self, role: str) -> list[psutil.Process]:
        """Processes of a role, the oldest first."""
        return self.job.titled(TITLES[role])

    def hurt_head(self, part: str, how: signal.Signals = signal.SIGKILL) -> float:
        """Signal the part of Ray's head of that name, "gcs_server" or "raylet"; returns when."""
        (process,) = (p for p in self.job.processes() if p.name() == part)
        now = time.time()
        process.send_signal(how)
        return now

    def hurt(self, role: str, how: signal.Signals = signal.SIGKILL, which: int = 0) -> float:
        """Signal one process of `role`; returns when."""
        process, now = self.pids(role)[which], time.time()
        process.send_signal(how)
        return now

    def told(self, what: str, who: str, since: float, within_s: float = 240) -> float:
        """Seconds from `since` until the driver told `what` of one whose name begins with `who`."""
        return wait_for_event(self.job, self.run_dir, what, who, since, within_s)["time"] - since

    def steps(self) -> int:
        """Steps in the log so far."""
        return len(rows(self.run_dir))

    def trains(self, steps: int, within_s: float = 240) -> None:
        """Wait for so many steps more."""
        wait_for_steps(self.job, self.run_dir, self.steps() + steps, within_s)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it; the job saves a checkpoint and ends."""
        os.killpg(self.job.process.pid, signal.SIGINT)
        assert self.job.wait(120) == 130, self.job.text()

    def books(self) -> Books:
        """The audit, which must balance."""
        books = audit(self.run_dir)
        assert books.discrepancies == [], books.discrepancies
        return books
