"""What the ledger costs a group on the driver's loop and a step on the disk, and how long the audit
of them takes.

python benchmarks/ledger.py --out ledger.json [--groups 1000000] [--per-step 256]
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import msgspec

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.run_dir import CONFIG, LEDGER
from async_opd.driver.ledger import Ledger
from async_opd.launch.new_run import environment
from async_opd.tools.audit.books import audit


async def write(path: Path, steps: int, per_step: int) -> tuple[float, float]:
    """Write a run's records; returns the seconds on the loop and in `sync`, in all."""
    ledger = Ledger(path)
    loop_s = sync_s = 0.0
    for step in range(1, steps + 1):
        ids = [f"{step * per_step + group}@0" for group in range(per_step)]
        began = time.perf_counter()
        for id in ids:
            ledger.handed_out(id)
        ledger.trained(step, ids)
        added = time.perf_counter()
        await ledger.sync()
        loop_s += added - began
        sync_s += time.perf_counter() - added
    ledger.finished()
    ledger.close()
    return loop_s, sync_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--groups", type=int, default=1_000_000)
    parser.add_argument("--per-step", type=int, default=256)
    args = parser.parse_args()
    steps = args.groups // args.per_step
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        settings = (f"learner.trajectories_per_step={args.per_step}", f"run.steps={steps}")
        (run / CONFIG).write_bytes(msgspec.json.encode(load(DEMO, settings)))
        loop_s, sync_s = asyncio.run(write(run / LEDGER, steps, args.per_step))
        began = time.perf_counter()
        books = audit(run)
        audit_s = time.perf_counter() - began
    assert books.discrepancies == []
    result = {
        "groups": books.handed_out,
        "loop_us_per_group": 1e6 * loop_s / books.handed_out,
        "sync_ms_per_step": 1e3 * sync_s / steps,
        "audit_s": audit_s,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(*(f"{key:18} {value:12,.2f}" for key, value in result.items()), sep="\n")
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    args.out.write_text(json.dumps(result | {"hardware": hardware} | environment(), indent=2))


if __name__ == "__main__":
    main()
