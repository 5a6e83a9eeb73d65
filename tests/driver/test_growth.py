"""What a long run costs: nothing that grows with its steps is held, or read as a whole."""

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from async_opd.config.load import load
from async_opd.core.recorded import RecordedTrajectory
from async_opd.core.roles import Roles
from async_opd.core.run_dir import SPANS
from async_opd.core.wire import StepResult
from async_opd.driver.checkpoints import find
from async_opd.driver.ledger import Ledger
from async_opd.driver.train import train
from async_opd.telemetry.metrics import Jsonl, Meter
from async_opd.telemetry.rollout_log import sample_file
from async_opd.telemetry.spans import Window, encode
from tests.driver.test_resume import run
from tests.simulated.roles import (
    Prompts,
    SimulatedGenerator,
    SimulatedLearner,
    SimulatedTeacher,
    SimulatedVerifier,
)
from tests.simulated.virtual_time import virtual


def test_a_resume_holds_none_of_the_rows_that_it_goes_on_behind(tmp_path):
    run(tmp_path)
    last = (tmp_path / "metrics.jsonl").read_text()
    for name in ("metrics.jsonl", "samples.jsonl"):
        earlier = json.dumps({"step": 1, "more": ["x" * 25] * 100}) + "\n"
        (tmp_path / name).write_text(earlier * 7_500 + last + earlier.replace("1", "6", 1))
    tracemalloc.start()
    try:
        run(tmp_path, "run.steps=6", checkpoint=find(tmp_path))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * 2**20  # bytes; the files have 40 million
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps[7_500:] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "set-aside" / "1" / "samples.jsonl").read_bytes().count(b"\n") == 1


def test_a_ledger_of_millions_of_records_opens_at_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with path.open("w") as file:
        for start in range(1, 3_000_001, 100_000):
            file.writelines(f'["out",{n},"{n}@0"]\n' for n in range(start, start + 100_000))
    began = time.process_time()
    ledger = Ledger(path)
    ledger.finished()
    ledger.close()
    assert time.process_time() - began < 1
    with path.open("rb") as file:
        file.seek(-25, os.SEEK_END)
        assert file.read().endswith(b'\n["finished",3000001]\n')


class Recording(SimulatedLearner):
    """Records a response every ten steps."""

    async def step(self, groups):
        result = await super().step(groups)
        if result.version % 10:
            return result
        ids = np.zeros(50, np.int32)
        numbers = {name: np.linspace(-1, 0, 50, dtype=np.float32) for name in "abcdef"}
        recorded = RecordedTrajectory(
            id=groups[0].prompt.id,
            step=result.version,
            prompt_ids=ids,
            ids=ids,
            prompt_tokens=50,
            tokens=50,
            truncated=False,
            reward=1.0,
            numbers=numbers,
        )
        return StepResult(version=result.version, metrics=result.metrics, recorded=(recorded,))


def grown(run_dir: Path, steps: int) -> tuple[float, int, float]:
    """(MiB, descriptors, MiB of files but rows and books) that a run of so many steps has gained
    over its last nine tenths; with checkpoints, spans and samples."""
    looks: dict[int, tuple[int, int, int]] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    linear = ("metrics.jsonl", "ledger.jsonl")

    def look(row) -> None:
        if row["step"] in (steps // 10, steps):
            files = (path for path in run_dir.rglob("*") if path.name not in linear)
            looks[row["step"]] = (
                int(Path("/proc/self/statm").read_text().split()[1]) * page,
                len(os.listdir("/proc/self/fd")),
                sum(path.stat().st_size for path in files if path.is_file()),
            )

    settings = (
        f"run.steps={steps}",
        "learner.trajectories_per_step=2",
        "rollout.samples_per_prompt=1",
        f"run.checkpoint_every_steps={max(100, steps // 1000)}",
        "teacher.evaluate=false",
        f"run.dir={run_dir}",
    )
    roles = Roles(
        generators=[SimulatedGenerator()],
        teachers={"": [SimulatedTeacher()]},
        verifier=SimulatedVerifier(),
        learner=Recording(),
    )
    meter = Meter(
        [Jsonl(run_dir / "metrics.jsonl"), look],
        spans=Window(run_dir, 50, Jsonl(run_dir / SPANS, encode)),
        record=sample_file(run_dir / "samples.jsonl", lambda ids: ["a"] * len(ids), 2**20),
    )
    virtual(train(load("configs/demo.toml", settings), roles, Prompts(), [], run_dir, meter))
    (memory, descriptors, files), (more, last, all_files) = looks.values()
    return (more - memory) / 2**20, last - descriptors, (all_files - files) / 2**20


@pytest.mark.soak
@pytest.mark.parametrize("steps", [1_000_000])
def test_a_run_of_a_million_steps_holds_no_more_at_its_end(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it takes most of the time
    memory, descriptors, files = grown(tmp_path, steps)
    assert (memory < 16, descriptors, files < 4) == (True, 0, True), (memory, descriptors, files)
    began = time.process_time()
    Ledger(tmp_path / "ledger.jsonl").close()
    assert time.process_time() - began < 1
