"""What a trajectory costs the driver, and what stays of it: the real loop, queue and metrics over
roles that answer at once. Steps of 16 trajectories, or of as many as there are generators; bound 4;
rows and spans go to files.

One run of 100,000 trajectories for each number of generators, looked at 1,000, 10,000 and 100,000
after its first step. CPU is the process's own since that step, stub ports and garbage collection
included, looks excluded. Objects are those the collector tracks after a full collection, resident
memory is the kernel's figure.

    python benchmarks/driver.py --out FILE [--repeat 3] [--trace-steps 0]
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.roles import Roles
from async_opd.core.run_dir import METRICS, SPANS
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import GroupMeta, Prompt, Rollout, Span, Verdict
from async_opd.driver.train import train
from async_opd.launch.new_run import environment
from async_opd.telemetry.metrics import Jsonl, Meter, Row, observed
from async_opd.telemetry.spans import Window, encode
from tests.simulated.roles import AT_ONCE, LOGP, PROBE_TOKENS, Prompts, SimulatedLearner

GENERATORS, LOOKS = (1, 8, 64, 512), (1_000, 10_000, 100_000)
PROMPT = np.zeros(1, np.int32)
PAGE = os.sysconf("SC_PAGE_SIZE")


class Instant:
    """Generator, teacher and verifier that answer when the loop comes round; `calls` counts what is
    asked of all. The simulated roles of the tests keep times and places, which would be part of
    what is measured here."""

    calls = 0

    def __init__(self):
        self.version = 0

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Prompt]:
        await self._answer()
        spans = (Span(version=self.version, start=0, end=64),)
        return GroupMeta(id=prompt.id, prompt_len=8, spans=(spans,), truncated=(False,)), prompt

    async def score(self, group: Prompt) -> tuple[tuple[str, ...], None]:
        await self._answer()
        return ("",), None

    async def check(self, group: Prompt) -> tuple[Verdict, ...]:
        await self._answer()
        return (Verdict(id=f"{group.id}#0", reward=1.0),)

    async def probe(
        self, prompt: np.ndarray = PROMPT, tokens: int = 0
    ) -> tuple[np.ndarray, Rollout]:
        await self._answer()
        tokens = tokens or PROBE_TOKENS
        spans, ids = (Span(version=self.version, start=0, end=tokens),), np.zeros(tokens, np.int32)
        logp = np.full(tokens, LOGP[0])
        return prompt, Rollout(
            id="probe#0", ids=ids, behaviour_logp=logp, spans=spans, truncated=True
        )

    async def join_group(self, group: WeightGroup) -> None: ...

    async def update(self, version: int, layout: WeightLayout, oldest: int) -> None:
        await self._answer()
        self.version = version

    async def resume(self, expected: int) -> None:
        await self._answer()

    async def check_health(self) -> None: ...

    def kill(self) -> None: ...

    async def _answer(self) -> None:
        Instant.calls += 1
        await asyncio.sleep(0)


class Scorer(Instant):
    """A teacher, whose probe is another than a generator's."""

    async def probe(self) -> np.ndarray:
        await self._answer()
        return np.zeros((1, 1), np.float32)


async def measure(
    generators: int, trajectories: int, folder: Path, trace_steps: int
) -> list[dict[str, float]]:
    """One run; what each look saw."""
    per_step = max(16, generators)
    steps = 1 + -(-trajectories // per_step)
    settings = (
        f"run.steps={steps}",
        f"learner.trajectories_per_step={per_step}",
        f"run.dir={folder}/run",
    )
    config = load(DEMO, [*settings, "teacher.evaluate=false"])
    looks, looking_s, due, began = [], 0.0, list(LOOKS), None

    def look(row: Row) -> None:
        nonlocal looking_s, began
        if began is None:
            began = time.process_time(), Instant.calls
        done = (row["step"] - 1) * per_step  # since then
        if not due or done < due[0]:
            return
        came = time.process_time()
        due.pop(0)
        gc.collect()
        looks.append(
            {
                "trajectories": done,
                "cpu_us_per_trajectory": 1e6 * (came - began[0] - looking_s) / done,
                "calls_per_trajectory": (Instant.calls - began[1]) / done,
                "objects": len(gc.get_objects()),
                "resident_mib": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20,
            }
        )
        looking_s += time.process_time() - came

    roles = Roles(
        generators=[Instant() for _ in range(generators)],
        teachers={"": [Scorer()]},
        verifier=Instant(),
        learner=SimulatedLearner(AT_ONCE, config.run.max_lag_steps),
    )
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run_dir = Path(name)
        write = Jsonl(run_dir / SPANS, encode)
        with observed({"spans": lambda: Window(run_dir, trace_steps, write)}) as (spans,):
            meter = Meter([Jsonl(folder / METRICS), look], spans=spans if trace_steps else None)
            summary = await train(config, roles, Prompts(), [], run_dir, meter)
            meter.flush()
    assert summary["scored_dropped"] == 0 and summary["max_lag_seen"] <= config.run.max_lag_steps
    return looks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument(
        "--repeat", type=int, default=1, help="repetitions of each setting, in turn"
    )
    parser.add_argument(
        "--trace-steps", type=int, default=50, help="of which spans are kept; 0: none"
    )
    args = parser.parse_args()
    raw: dict[int, list] = {generators: [] for generators in GENERATORS}
    with tempfile.TemporaryDirectory() as folder:
        # imports and first calls are nobody's
        asyncio.run(measure(1, 1_000, Path(folder), args.trace_steps))
        gc.collect()
        gc.freeze()  # as `async_opd.launch.run` does before training
        for _ in range(args.repeat):
            for generators in GENERATORS:
                raw[generators].append(
                    asyncio.run(measure(generators, LOOKS[-1], Path(folder), args.trace_steps))
                )
    print("CPU, us a trajectory")
    titles = (*(f"first {n:,}" for n in LOOKS), "last / first", "calls each", "objects +", "MiB +")
    print(
        f"{'generators':>10}{'a step':>8}"
        + "".join(f"{title:>15}" for title in titles)
        + "  limited by"
    )
    rows = []
    for generators, runs in raw.items():
        cpu = [
            statistics.median(run[at]["cpu_us_per_trajectory"] for run in runs)
            for at in range(len(LOOKS))
        ]
        row = {
            "generators": generators,
            "trajectories_per_step": max(16, generators),
            "cpu_us_per_trajectory": cpu,
            "last_over_first": cpu[-1] / cpu[0],
            "calls_per_trajectory": runs[0][-1]["calls_per_trajectory"],
            "objects_grown": max(run[-1]["objects"] - run[0]["objects"] for run in runs),
            "resident_mib_grown": max(
                run[-1]["resident_mib"] - run[0]["resident_mib"] for run in runs
            ),
        }
        own = 3 / row["calls_per_trajectory"]  # of the calls
        row["limited_by"] = (
            f"asyncio's tasks and turns: {own:.0%} generate, score and check, the rest updates"
        )
        rows.append(row | {"raw": runs})
        cells = [
            *(f"{us:.0f}" for us in cpu),
            f"{row['last_over_first']:.2f}",
            f"{row['calls_per_trajectory']:.2f}",
        ]
        cells += [f"{row['objects_grown']:,}", f"{row['resident_mib_grown']:.1f}"]
        print(
            f"{generators:>10}{row['trajectories_per_step']:>8}"
            + "".join(f"{cell:>15}" for cell in cells)
            + f"  {row['limited_by']}"
        )
    hardware = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processor": platform.processor(),
    }
    found = {"rows": rows, "hardware": hardware, "python": platform.python_version()}
    args.out.write_text(json.dumps(found | environment(), indent=2))


if __name__ == "__main__":
    main()
