"""Self-distillation on the whole real stack; `test_train.py` runs SG-OPD, `benchmarks/methods.py`
every method."""

import json

import pytest

from async_opd.driver.checkpoints import find
from tests.e2e.conftest import demo, rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
STEPS, TRAJECTORIES = 20, 16


def test_egrsd_trains_on_its_own_teacher_with_a_solution_before_its_eyes(tmp_path):
    job = demo(
        tmp_path,
        "run.max_lag_steps=4",
        "learner.lr=2e-4",
        'objective={tag="egrsd"}',
        "teacher.model=toy:student",
        "data.solution=solution",
        'teacher.context="{solution}{prompt}"',
        "teacher.max_prompt_tokens=64",
        "teacher.update=ema",
        steps=STEPS,
    )
    assert job.wait(300) == 0, job.text()
    run = tmp_path / "run"
    found = rows(run)
    assert len(found) == STEPS and max(row["lag_max"] for row in found) <= 4
    assert all(0.8 <= row["direction"] <= 1.2 for row in found)  # clip 0.2
    assert all(0.7 <= row["certainty"] <= 1 for row in found)  # γ 0.3
    assert sum(row["weight_by_method"] != 0 for row in found) > 10
    state = json.loads((find(run).folder / "learner" / "rank-0.json").read_text())
    count, *_ = state["running"]["reward"]
    assert state["version"] == STEPS and count == STEPS * TRAJECTORIES
    assert json.loads((run / "summary.json").read_text())["scored_dropped"] == 0
