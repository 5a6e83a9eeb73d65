"""The real stack through the command line for a few steps."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd import metric_names
from async_opd.cli import main
from async_opd.metrics import ROLES, STATES
from async_opd.toy import STUDENT
from tests.e2e.conftest import Job, demo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def finished(tmp_path: Path, *overrides: str, steps: int = 4) -> Path:
    job = demo(tmp_path, *overrides, steps=steps)
    assert job.wait(240) == 0, job.text()
    assert job.gone_within(20) == []
    return tmp_path / "run"


def test_a_synchronous_run_is_on_policy_and_repeats_itself(tmp_path):
    settings = ("run.max_lag_steps=0", "sync.parity_every_steps=1")
    curves = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        found = rows(finished(tmp_path / name, *settings))
        assert [row["lag_max"] for row in found] == [0, 0, 0, 0]
        assert max(row["log_ratio_fresh_max"] for row in found) < 1e-3  # engine mismatch alone
        assert max(row["parity_gap"] for row in found) < 1e-4
        assert {row["tokens_excluded"] for row in found} == {0}
        curves.append([row["loss"] for row in found])
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert len(set(curves[0])) == 4  # it did learn something


def test_an_asynchronous_run_keeps_its_bound_and_leaves_a_loadable_checkpoint(tmp_path):
    settings = ("run.max_lag_steps=2", "rollout.samples_per_prompt=2", "eval.every_steps=4")
    run = finished(tmp_path, *settings, steps=12)
    found, summary = rows(run), json.loads((run / "summary.json").read_text())
    assert 0 < max(row["lag_max"] for row in found) == summary["max_lag_seen"] <= 2
    for role, row in itertools.product(ROLES, [*found, summary]):
        assert sum(row[f"{role}_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)
    assert all(summary[f"{role}_busy"] > 0 for role in ROLES)
    assert {metric_names.of(key).name for row in found for key in row} > {"lr", "grad_norm", "kl"}  # no unknown key
    assert summary["generators_syncing"] > 0 and summary["learner_syncing"] > 0
    assert summary["steps"] == 12
    assert summary["scored_dropped"] == 0
    assert {"accuracy_before", "accuracy_after", "teacher_accuracy", "trained_tokens_per_s", "wall_s"} <= summary.keys()
    evaluated = [row for row in found if row["eval_accuracy"] is not None]
    assert [row["eval_version"] for row in evaluated][:2] == [0, 4]  # before training, and beside it
    for row in evaluated:
        assert row["eval_version"] <= row["eval_version_min"] <= row["eval_version_max"] <= row["step"]
        assert 0 <= row["eval_accuracy"] <= 1 and 0 < row["eval_tokens"] <= 64
    assert json.loads((run / "config.json").read_text())["run"]["max_lag_steps"] == 2
    assert json.loads((run / "environment.json").read_text())["versions"]["ray"]

    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    start = load_file(STUDENT / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start)
    assert AutoTokenizer.from_pretrained(run / "checkpoint")("1+2=").input_ids

    assert main(["trace", str(run)]) == 0
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"driver", "learner", "generator 0", "teacher 0", "verifier 0"} <= lanes
    steps = [event["args"] for event in events if event["name"] == "step"]
    assert [args["step"] for args in steps] == list(range(1, 13))
    followed = {event["args"]["group"] for event in events if event["name"] == "generate"}
    assert {id for args in steps for id in args["groups"]} == followed

    assert main(["export", str(run)]) == 0
    settings = ("problems=16", "rollout.max_new_tokens=64", "rollout.enforce_eager=true")
    words = (f"{run}/export", "--data", f"{run}/data/heldout.jsonl", "--out", f"{tmp_path}/eval", *settings)
    again = Job("eval", *words, folder=tmp_path)
    assert again.wait(200) == 0, again.text()
    result = json.loads((tmp_path / "eval/result.json").read_text())
    means = {name: figure["mean"] for name, figure in result["figures"].items()}
    assert means == dict.fromkeys(("avg", "pass", "maj"), summary["accuracy_after"])  # vLLM loads what was exported
    lines = [json.loads(line) for line in (tmp_path / "eval/problems.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) == 16
    assert all("boxed" in line["responses"][0]["text"] for line in lines if line["avg"])
