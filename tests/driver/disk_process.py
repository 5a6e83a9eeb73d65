"""A run over simulated roles in a process of its own, whose disk is watched, or hangs. Not a test:
`test_disk.py` starts it, with a run directory and `watch`, or a call of `os` that is to hang and
the files with which it does."""

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

from async_opd.config.load import load
from async_opd.core.errors import AsyncOpdError
from async_opd.core.roles import Roles
from async_opd.driver import checkpoints, resize
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Jsonl, Meter, observed
from tests.simulated.roles import (
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)

SETTINGS = (
    "run.steps=9",
    "run.checkpoint_every_steps=2",
    "learner.trajectories_per_step=4",
    "learner.warmup_steps=0",
    "teacher.evaluate=false",
    "timeout.step_s=1",
    "timeout.stall_s=1",
    "sync.timeout_s=0.5",
)
UNAUDITED = ("stat", "lstat", "fsync", "write", "ftruncate", "readlink")
AUDITED = ("open", "os.", "shutil.", "glob.", "tempfile.", "subprocess.")


class Elsewhere(SimulatedLearner):
    """A learner that writes in another process, and leaves time for a request."""

    async def step(self, groups):
        await asyncio.sleep(0.05)
        return await super().step(groups)

    async def save(self, folder):
        await asyncio.to_thread(lambda: Path(folder).mkdir(parents=True))

    async def save_state(self, folder):
        await asyncio.to_thread(asyncio.run, super().save_state(folder))

    async def load_state(self, folder):
        await asyncio.to_thread(asyncio.run, super().load_state(folder))


async def spawn(pool: str, index: int) -> SimulatedGenerator:
    return SimulatedGenerator()


async def run(run_dir: Path, steps: int, checkpoint=None) -> None:
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"": [SimulatedTeacher()]},
        verifier=SimulatedVerifier(),
        learner=Elsewhere(),
        spawn=spawn,
    )
    config = load("configs/demo.toml", [*SETTINGS, f"run.steps={steps}"])
    with observed({"jsonl": lambda: Jsonl(run_dir / "metrics.jsonl")}) as sinks:
        await train(config, roles, Prompts(), [], run_dir, Meter(sinks), checkpoint=checkpoint)


def hang(run_dir: Path, name: str, files: str) -> None:
    """From now on the call `os.name` never returns for one of `files`, once there are rows."""
    call = getattr(os, name)

    def hanging(path, *args, **more):
        place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else f"{path}"
        if files in place and (run_dir / "metrics.jsonl").exists():
            time.sleep(10_000)
        return call(path, *args, **more)

    setattr(os, name, hanging)


def watch(run_dir: Path) -> set[str]:
    """What this thread asks of the disk in `run_dir` from now on."""
    asked, loop = set(), threading.get_ident()

    def note(name: str, args: tuple) -> None:
        if threading.get_ident() == loop and any(f"{run_dir}" in f"{arg}" for arg in args):
            asked.add(f"{name} {args[0]}")

    def noting(name: str, call):
        def noted(path, *args, **more):
            place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path
            note(f"os.{name}", (place,))
            return call(path, *args, **more)

        return noted

    sys.addaudithook(lambda name, args: name.startswith(AUDITED) and note(name, args))
    for name in UNAUDITED:
        if name != "readlink":
            setattr(os, name, noting(name, getattr(os, name)))
    return asked


async def watched(run_dir: Path) -> set[str]:
    """Train with a request on the way, and go on from an earlier checkpoint."""
    resize.POLL_S = 0.02
    (run_dir / "config.json").write_text("{}")
    (run_dir / "scale-1.json").write_text('{"sizes": {"generators": 1}}')
    asked = watch(run_dir)
    await run(run_dir, 5)
    found = await asyncio.to_thread(checkpoints.find, run_dir / "checkpoints" / "000004")
    await run(run_dir, 9, found)
    answered = await asyncio.to_thread((run_dir / "scale-1.answer").read_text)
    assert answered.startswith("[false"), answered
    return asked


def main(run_dir: Path, how: str, files: str = "") -> None:
    if how == "watch":
        print(*sorted(asyncio.run(watched(run_dir))), sep="\n")
        return
    hang(run_dir, how, files)
    try:
        asyncio.run(run(run_dir, 9))
    except AsyncOpdError as e:
        print(type(e).__name__, e, *getattr(e, "__notes__", ()), sep="; ", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
