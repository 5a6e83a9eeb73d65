"""What ledger, parity probes and supervision cost a run in which nothing goes wrong.

The balanced regime of `paced.py`, fixed lengths, bound 4, in wall time: the real driver over roles
that take set times, with a ledger on disk, a probe each 10 steps, and a look at each member twice a
second; and in turns without any of them. The roles are stubs: what a probe costs an engine is in
the set times, what a look costs one is not.

    python benchmarks/safety.py --out safety.json [--repeat 5]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from async_opd.driver.ledger import Ledger
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.launch.new_run import environment
from tests.simulated.roles import Pace
from tests.simulated.runs import measure

PACE, STEPS = Pace.of(1, 1), 60


async def nothing(*_) -> None: ...


def run(*, safe: bool) -> dict:
    """One run; without safety nothing is written, probed or watched."""
    every = 10 if safe else 10**6
    with ExitStack() as off:
        if not safe:
            off.enter_context(patch.object(Ledger, "sync", nothing))
            off.enter_context(patch.object(Ledger, "_add", lambda *_: None))
            off.enter_context(patch.object(Pool, "start", lambda *_, **__: None))
        settings = (f"sync.parity_every_steps={every}", "timeout.health_s=0.5")
        return asyncio.run(measure(PACE, *settings, bound=4, steps=STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs")
    args = parser.parse_args()
    run(safe=True)  # imports and first calls
    raw = [{safe: run(safe=safe) for safe in (True, False)} for _ in range(args.repeat)]
    speed = {safe: [pair[safe]["trajectories_per_s"] for pair in raw] for safe in (True, False)}
    cpu = {
        safe: statistics.median(pair[safe]["cpu_ms_per_trajectory"] for pair in raw)
        for safe in (True, False)
    }
    ratio = statistics.median(on / off for on, off in zip(speed[True], speed[False], strict=True))
    for safe, name in ((True, "on"), (False, "off")):
        print(
            f"{name:>4} {statistics.median(speed[safe]):8.2f} trajectories/s {cpu[safe]:8.3f} ms"
            " CPU each"
        )
    print(f"on / off: {ratio:.4f}")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    result = {
        "ratio": ratio,
        "speed": {str(k): v for k, v in speed.items()},
        "cpu_ms": {str(k): v for k, v in cpu.items()},
    }
    args.out.write_text(
        json.dumps(result | {"seed": 0, "hardware": hardware} | environment(), indent=2)
    )


if __name__ == "__main__":
    main()
