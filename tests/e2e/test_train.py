"""One asynchronous run of the real stack to its end, and what can be done with what it leaves.

It needs most of the pipeline: SG-OPD in groups, with a reference, the teacher's own answers for a
while, evaluations beside training; `benchmarks/methods.py` runs every method.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd.cli.main import main
from async_opd.telemetry import metric_names
from async_opd.telemetry.metrics import ROLES, STATES
from async_opd.toy import STUDENT
from tests.e2e.conftest import Job, demo, rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
BOUND, STEPS = 4, 20


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of the finished run."""
    folder = tmp_path_factory.mktemp("sg-opd")
    job = demo(
        folder,
        f"run.max_lag_steps={BOUND}",
        "learner.lr=2e-4",
        "eval.every_steps=4",
        'objective={tag="sg_opd"}',
        "rollout.samples_per_prompt=4",
        "teacher_sampling.share=0.25",
        "teacher_sampling.full_until_step=6",
        "teacher_sampling.until_step=12",
        steps=STEPS,
    )
    assert job.wait(300) == 0, job.text()
    assert job.gone_within(60) == []
    return folder / "run"


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_every_step_keeps_the_bound_and_nothing_scored_is_dropped(run):
    found, total = rows(run), summary(run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert 0 < max(row["lag_max"] for row in found) == total["max_lag_seen"] <= BOUND
    assert total["steps"] == STEPS and total["scored_dropped"] == 0
    expected = {
        "accuracy_before",
        "accuracy_after",
        "teacher_accuracy",
        "trained_tokens_per_s",
        "wall_s",
    }
    assert expected <= total.keys()


def test_the_states_of_every_role_add_up(run):
    found, total = rows(run), summary(run)
    for role, row in itertools.product(ROLES, [*found, total]):
        assert sum(row[f"{role}_{state}"] for state in STATES) == pytest.approx(1, abs=0.01)
    assert all(total[f"{role}_busy"] > 0 for role in ROLES)
    assert total["generators_syncing"] > 0 and total["learner_syncing"] > 0


def test_every_key_of_a_row_has_a_meaning(run):
    assert {metric_names.of(key).name for row in rows(run) for key in row} > {
        "lr",
        "grad_norm",
        "kl",
    }


def test_evaluations_beside_training_name_their_versions(run):
    evaluated = [row for row in rows(run) if row["eval_accuracy"] is not None]
    # before training, and beside it
    assert [row["eval_version"] for row in evaluated][:2] == [0, 4]
    for row in evaluated:
        assert (
            row["eval_version"] <= row["eval_version_min"] <= row["eval_version_max"] <= row["step"]
        )
        assert 0 <= row["eval_accuracy"] <= 1 and 0 < row["eval_tokens"] <= 64


def test_each_token_has_a_sign_and_some_disagree(run):
    found = rows(run)
    for row in found:
        assert row["agree"] + row["disagree"] + row["no_sign"] == pytest.approx(1, abs=1e-5)
    assert any(row["agree"] > 0 for row in found) and any(row["disagree"] > 0 for row in found)


def test_the_teachers_own_answers_are_learned_from_for_a_while_and_each_is_counted(run):
    found, total = rows(run), summary(run)
    taught = [row["taught"] for row in found]
    assert sum(taught) > 0 and not any(taught[12:])  # none after step 12
    assert [row["tokens_taught"] > 0 for row in found] == [count > 0 for count in taught]
    assert all(row["loss_taught"] > 0 for row in found if row["taught"])
    causes = sum(count for key, count in total.items() if key.startswith("dropped_teacher"))
    assert total["taught_requested"] == sum(taught) + causes


def test_the_config_and_the_versions_are_kept(run):
    assert json.loads((run / "config.json").read_text())["run"]["max_lag_steps"] == BOUND
    assert json.loads((run / "environment.json").read_text())["versions"]["ray"]


def test_the_checkpoint_loads_with_weights_that_moved(run):
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    start = load_file(STUDENT / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, start)
    assert AutoTokenizer.from_pretrained(run / "checkpoint")("1+2=").input_ids


def test_a_trace_follows_every_trained_group_into_its_step(run):
    assert main(["trace", str(run)]) == 0
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"driver", "learner", "generator 0", "teacher 0", "verifier 0"} <= lanes
    steps = [event["args"] for event in events if event["name"] == "step"]
    assert [args["step"] for args in steps] == list(range(1, STEPS + 1))
    followed = {event["args"]["group"] for event in events if event["name"] == "generate"}
    assert {id for args in steps for id in args["groups"]} == followed


def test_an_evaluation_of_the_export_gives_the_runs_own_accuracy(run, tmp_path):
    assert main(["export", str(run)]) == 0
    settings = ("problems=16", "rollout.max_new_tokens=64", "rollout.enforce_eager=true")
    data = ("--data", f"{run}/data/heldout.jsonl", "--out", f"{tmp_path}/eval")
    job = Job("eval", f"{run}/export", *data, *settings, folder=tmp_path)
    assert job.wait(200) == 0, job.text()
    result = json.loads((tmp_path / "eval/result.json").read_text())
    means = {name: figure["mean"] for name, figure in result["figures"].items()}
    expected = dict.fromkeys(("avg", "pass", "maj"), summary(run)["accuracy_after"])
    assert means == expected  # vLLM loads what was exported
    lines = [
        json.loads(line) for line in (tmp_path / "eval/problems.jsonl").read_text().splitlines()
    ]
    assert len({line["id"] for line in lines}) == len(lines) == 16
    assert all("boxed" in line["responses"][0]["text"] for line in lines if line["avg"])
