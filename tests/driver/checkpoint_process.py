"""Does to checkpoints what the tests' own process must be spared. Not a test: `test_checkpoints.py`
starts it.

`kill TEMPLATE OUT what`: does `what` to copies of the run TEMPLATE, OUT/1, OUT/2, ..., each in a
process that kills itself before its 1st, 2nd, ... change of the file system, until one comes to its
end. `fill RUN`: saves step 2 on a disk with no room left, then again with room; prints the error of
the first.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

from async_opd.core.errors import CheckpointError
from async_opd.driver import set_aside
from async_opd.driver.checkpoints import Checkpoints, RunState

# Audited just before they happen.
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink"}


def save(
    run: Path, step: int, tag: str = "new", *, keep: int = 1, score: float | None = None
) -> None:
    checkpoints = Checkpoints(run, keep)
    folder = checkpoints.begin(step)
    for name in ("model/weights", "learner/deep/shard"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"{name} of {step} {tag}")
    checkpoints.commit(
        step,
        RunState(
            version=step,
            position={"epoch": step},
            outstanding=["a@0"],
            score=score,
            counters={"tag": tag},
        ),
    )


BOOKS = {
    name: "".join(f'{{"step": {n}}}\n' for n in range(1, 4)).encode()
    for name in ("metrics.jsonl", "samples.jsonl", "samples.earlier.jsonl")
}
BOOKS["summary.json"] = b'{"steps": 3}'


def go_back(run: Path) -> None:
    """What a resume from step 1 does to the files, but for the ledger."""
    aside = Checkpoints(run, 1).rewind(1)
    set_aside.cut(run, 1, copied=aside is not None)


WHAT = dict(
    save_1=lambda run: save(run, 1),
    save_2=lambda run: save(run, 2),
    save_3=lambda run: save(run, 3),
    rewind=lambda run: Checkpoints(run, 1).rewind(1),
    go_back=go_back,
    recover=lambda run: Checkpoints(run, 1).recover(),
)


def kill(template: str, out: str, what: str) -> None:
    # It takes most of the time, and a kill, unlike a power cut, loses nothing written.
    os.fsync = lambda descriptor: None
    for last in count(1):
        run = Path(out, str(last))
        shutil.copytree(template, run, symlinks=True)
        child = os.fork()
        if not child:
            changes = count(1)

            def before(event, args, changes=changes, last=last):
                if event in CHANGES and next(changes) == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(before)
            WHAT[what](run)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            assert status == 0
            return


def fill(run: str) -> None:
    checkpoints = Checkpoints(Path(run), 1)
    with (checkpoints.begin(2) / "shard").open("wb", buffering=0) as shard:
        try:
            while True:
                shard.write(bytes(512))
        except OSError:
            pass
    try:
        checkpoints.commit(2, RunState(version=2, position={}, outstanding=["prompt"] * 2000))
    except CheckpointError as e:
        print(e)
    left = sorted(os.listdir(Path(run, "checkpoints")))
    assert left == ["000001"], left
    assert Path(run, "checkpoint", "weights").read_text() == "model/weights of 1 old"
    save(Path(run), 2)
    assert Path(run, "checkpoint", "weights").read_text() == "model/weights of 2 new"


if __name__ == "__main__":
    {"kill": kill, "fill": fill}[sys.argv[1]](*sys.argv[2:])
