"""What the driver costs: the real loop, slots, queue and publication over roles that take set
times.

Steps of 16 trajectories. The longest role needs 0.25 s a step, the others the share of it that the
regime says; 128 tokens a response, all alike or lognormal (sigma 1, at most 16 times the mean). One
generator serves 16 requests at once, a token of each every so often, and stands still during an
update. The teacher takes what is queued, at most 8 groups at once, and needs a quarter of 0.25 s a
step. An update takes 5 ms of generator and learner, a probe of 8 tokens at every tenth. Time is
wall time, the driver's CPU included.

`of_longest` leaves out the first 5 steps, in which the pipeline fills, and the last 5, in which it
runs empty; `measure` says what it is.

    python benchmarks/paced.py --out FILE [--repeat 3]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from async_opd.launch.new_run import environment
from tests.simulated.roles import Pace
from tests.simulated.runs import REGIMES, measure

# title, key, format; medians over the repetitions, except for the two counts: the largest
COLUMNS = (
    ("traj/s", "trajectories_per_s", ".1f"),
    ("of longest", "of_longest", ".3f"),
    ("gen busy", "generators_busy", ".1%"),
    ("learn busy", "learner_busy", ".1%"),
    ("learn sync", "learner_syncing", ".1%"),
    ("over age", "excluded_share", ".1%"),
    ("max lag", "max_lag_seen", "d"),
    ("dropped", "scored_dropped", "d"),
    ("CPU ms/traj", "cpu_ms_per_trajectory", ".2f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument(
        "--repeat", type=int, default=1, help="repetitions of each setting, in turn"
    )
    args = parser.parse_args()

    settings = [
        (regime, bound, Pace.of(*shares, heavy_tail=heavy))
        for regime, shares in REGIMES.items()
        for heavy in (False, True)
        for bound in ((4, 0) if regime == "balanced" else (4,))
    ]
    rows = [
        {"regime": regime, "bound": bound, "pace": asdict(pace), "raw": []}
        for regime, bound, pace in settings
    ]
    for repetition in range(args.repeat):
        for row, (_, bound, pace) in zip(rows, settings, strict=True):
            row["raw"].append(asyncio.run(measure(pace, bound=bound, seed=repetition)))
    print(
        f"{'regime':<17}{'lengths':<11}{'bound':>5}"
        + "".join(f"{title:>12}" for title, *_ in COLUMNS)
        + "  limited by"
    )
    for row in rows:
        for _, key, spec in COLUMNS:
            row[key] = (max if spec == "d" else statistics.median)(run[key] for run in row["raw"])
        row["limited_by"] = row["raw"][0]["longest"] if row["bound"] else "roles taking turns"
        lengths = "heavy tail" if row["pace"]["heavy_tail"] else "fixed"
        cells = "".join(f"{row[key]:>12{spec}}" for _, key, spec in COLUMNS)
        print(f"{row['regime']:<17}{lengths:<11}{row['bound']:>5}{cells}  {row['limited_by']}")
    balanced = [row for row in rows if row["regime"] == "balanced"]
    speeds = {
        (row["pace"]["heavy_tail"], row["bound"]): row["trajectories_per_s"] for row in balanced
    }
    over = {
        "fixed": speeds[False, 4] / speeds[False, 0],
        "heavy_tail": speeds[True, 4] / speeds[True, 0],
    }
    print(
        f"asynchronous over synchronous, balanced: {over['fixed']:.2f} fixed,"
        f" {over['heavy_tail']:.2f} heavy tail"
    )
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    found = {
        "async_over_sync": over,
        "rows": rows,
        "hardware": hardware,
        "python": platform.python_version(),
    }
    args.out.write_text(json.dumps(found | environment(), indent=2))


if __name__ == "__main__":
    main()
