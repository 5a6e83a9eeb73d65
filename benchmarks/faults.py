"""Every injection on real jobs, with the time until it was noticed and until training was whole
again.

A small demo (16 trajectories a step, 2 generators, 2 teachers, a checkpoint every 5 steps, an actor
given up after 6 s without a sign of life) is hurt in one way after another. `noticed`: until the
driver told of it; for a killed driver, or head of Ray's, until
all processes were gone. `next step`: until a step
more had been trained. `whole`: until the replacement served, or the run trained again. In the end
the books are audited.

    python benchmarks/faults.py --out faults.json
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from async_opd.launch.new_run import environment
from tests.faults.harness import Hurt

SETTINGS = (
    "rollout.generators=2",
    "teacher.replicas=2",
    "run.checkpoint_every_steps=5",
    "run.max_restarts=9",
)
SETTINGS += ("timeout.stall_s=6", "sync.timeout_s=5")


def replaced(hurt: Hurt, role: str, how: signal.Signals = signal.SIGKILL) -> dict[str, float]:
    """Hurt a member of `role`, which is replaced."""
    at = hurt.hurt(role, how)
    return measured(
        hurt, at, hurt.told("lost", role, at, 60), lambda: hurt.told("serves", role, at, 180)
    )


def in_a_broadcast(hurt: Hurt) -> dict[str, float]:
    """The update waits for a stopped generator, which is then killed."""
    process = hurt.pids("generator")[0]
    process.suspend()
    time.sleep(2)
    at = time.time()
    process.kill()
    noticed = hurt.told("lost", "generator", at, 60)
    return measured(hurt, at, noticed, lambda: hurt.told("serves", "generator", at, 180))


def learner(hurt: Hurt) -> dict[str, float]:
    """A lost rank: the run starts again from its checkpoint."""
    at = hurt.hurt("learner")
    noticed = hurt.told("starts again", "run", at, 60)
    return measured(hurt, at, noticed, lambda: time.time() - at, steps_within_s=240)


def driver(hurt: Hurt) -> dict[str, float]:
    """A killed driver: its processes go, and `train --resume` goes on."""
    at = time.time()
    hurt.job.process.kill()
    hurt.job.wait(5)
    return resumed(hurt, at)


def head(hurt: Hurt, part: str) -> dict[str, float]:
    """A part of Ray's head is killed: the run ends by name, and `train --resume` goes on."""
    at = hurt.hurt_head(part)
    assert hurt.job.wait(90) == 1, hurt.job.text()
    assert "HeadLost" in hurt.job.text()
    return resumed(hurt, at)


def resumed(hurt: Hurt, at: float) -> dict[str, float]:
    """Go on with a run whose processes go."""
    assert hurt.job.gone_within(60) == []
    noticed = time.time() - at
    hurt.resume(hurt.run_dir.parent)
    return measured(hurt, at, noticed, lambda: time.time() - at, steps_within_s=240)


def measured(
    hurt: Hurt, at: float, noticed: float, whole, steps_within_s: float = 120
) -> dict[str, float]:
    hurt.trains(1, within_s=steps_within_s)
    found = {"noticed_s": noticed, "next_step_s": time.time() - at, "whole_s": whole()}
    hurt.trains(6, within_s=120)
    return found


INJECTIONS = {
    "generator killed": lambda hurt: replaced(hurt, "generator"),
    "generator killed in a broadcast": in_a_broadcast,
    "generator stopped": lambda hurt: replaced(hurt, "generator", signal.SIGSTOP),
    "one of two teachers killed": lambda hurt: replaced(hurt, "teacher"),
    "verifier killed": lambda hurt: replaced(hurt, "verifier"),
    "learner rank killed": learner,
    "driver killed, resumed": driver,
    "Ray's gcs_server killed, resumed": lambda hurt: head(hurt, "gcs_server"),
    "Ray's raylet killed, resumed": lambda hurt: head(hurt, "raylet"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hurt = Hurt(Path(folder), *SETTINGS)
        hurt.trains(6, within_s=240)
        found = {}
        print(
            f"{'injection':34} {'noticed, s':>11} {'next step, s':>13} {'whole, s':>9}", flush=True
        )
        for name, inject in INJECTIONS.items():
            row = found[name] = inject(hurt)
            print(
                f"{name:34} {row['noticed_s']:11.1f} {row['next_step_s']:13.1f}"
                f" {row['whole_s']:9.1f}",
                flush=True,
            )
        hurt.interrupt()
        books = hurt.books()
        assert hurt.job.gone_within(60) == []
    totals = {
        "steps": books.steps,
        "handed_out": books.handed_out,
        "trained": books.trained,
        "dropped": sum(books.dropped.values()),
        "handed_back": sum(books.returned.values()),
        "resumes": len(books.resumed_at),
    }
    print(f"{', '.join(f'{value} {name}' for name, value in totals.items())}; the books balance")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    result = {"injections": found, "books": totals, "hardware": hardware}
    args.out.write_text(json.dumps(result | environment(), indent=2))


if __name__ == "__main__":
    main()
