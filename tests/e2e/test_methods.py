"""The methods that need most of the pipeline, on the whole real stack; `benchmarks/methods.py` runs every one."""

import json
from pathlib import Path

import pytest

from async_opd.checkpoints import find
from tests.e2e.conftest import demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
STEPS, TRAJECTORIES = 20, 16


def finished(tmp_path: Path, *overrides: str) -> tuple[list[dict], dict, Path]:
    """Rows, summary and run directory of 20 steps at bound 4."""
    job = demo(tmp_path, "run.max_lag_steps=4", "learner.lr=2e-4", *overrides, steps=STEPS)
    assert job.wait(300) == 0, job.text()
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS and max(row["lag_max"] for row in rows) <= 4
    return rows, json.loads((run / "summary.json").read_text()), run


def test_egrsd_trains_on_its_own_teacher_with_a_solution_before_its_eyes(tmp_path):
    rows, summary, run = finished(
        tmp_path,
        'objective={tag="egrsd"}',
        "teacher.model=toy:student",
        "data.solution=solution",
        'teacher.context="{solution}{prompt}"',
        "teacher.max_prompt_tokens=64",
        "teacher.update=ema",
    )
    assert all(0.8 <= row["direction"] <= 1.2 for row in rows)  # clip 0.2
    assert all(0.7 <= row["certainty"] <= 1 for row in rows)  # γ 0.3
    assert sum(row["weight_by_method"] != 0 for row in rows) > 10
    state = json.loads((find(run).folder / "learner" / "rank-0.json").read_text())
    count, *_ = state["running"]["reward"]
    assert state["version"] == STEPS and count == STEPS * TRAJECTORIES
    assert summary["scored_dropped"] == 0


def test_sg_opd_trains_in_groups_against_the_reference_and_learns_from_the_teachers_own_answers_for_a_while(tmp_path):
    rows, summary, _ = finished(
        tmp_path,
        'objective={tag="sg_opd"}',
        "rollout.samples_per_prompt=4",
        "teacher_sampling.share=0.25",
        "teacher_sampling.full_until_step=6",
        "teacher_sampling.until_step=12",
    )
    assert all(row["agree"] + row["disagree"] + row["no_sign"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert any(row["agree"] > 0 for row in rows) and any(row["disagree"] > 0 for row in rows)
    taught = [row["taught"] for row in rows]
    assert sum(taught) > 0 and not any(taught[12:])  # none after step 12
    assert [row["tokens_taught"] > 0 for row in rows] == [count > 0 for count in taught]
    assert all(row["loss_taught"] > 0 for row in rows if row["taught"])
    causes = sum(count for key, count in summary.items() if key.startswith("dropped_teacher"))
    assert summary["taught_requested"] == sum(taught) + causes
