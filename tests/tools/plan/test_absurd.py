"""Absurd counts are planned or refused at once, by the setting that has them."""

import json
import time

import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import main
from async_opd.toy import STUDENT

HUGE = "1" + "0" * 400
RATES = "--rates generator={},teacher=1,learner={}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "rollout.generators=1000000000",
            "rollout.generators = 1000000000: a run has at most 1024",
        ),
        ("teacher.replicas=1025", "teacher.replicas = 1025: a run has at most 1024 members"),
        (
            "learner.ranks=1000000000 learner.trajectories_per_step=1000000000000",
            "learner.ranks = 1000000000: a run has at most 1024 members",
        ),
        (f"rollout.concurrency={HUGE}", "rollout.concurrency = 1"),
        ("learner.micro_batch_tokens=1000000000001", "micro_batch_tokens = 1000000000001: plan"),
        ("timeout.step_s=1e300", "timeout.step_s = 1e+300: plan counts up to 1e+12"),
        (
            "--gpu-memory-gib 1e308",
            "--gpu-memory-gib: 1e308: must be a finite number > 0 and <= 1000000",
        ),
        (RATES.format("1e-308", "1"), "from 0.001 to 1e+12"),
        (RATES.format("1", "1e308"), "from 0.001 to 1e+12"),
    ],
)
def test_what_is_a_slip_is_refused(words, says, capsys):
    began = time.process_time()
    assert main(["plan", str(DEMO), "--offline", *words.split()]) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1) and says in line
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "words",
    [
        "rollout.generators=1000",
        "rollout.generators=900 --nodes 1000000000",
        "rollout.generators=900 --nodes 2",
        "rollout.generators=900 --gpus-per-node 1000000000000",
        "rollout.generators=100 --gpu-memory-gib 0.001",
        "rollout.tensor_parallel_size=1000000000",
    ],
)
def test_what_is_large_is_answered(words, capsys):
    began = time.process_time()
    assert main(["plan", str(DEMO), "--offline", *words.split()]) in (0, 1)
    assert capsys.readouterr().out.splitlines()[-1] in ("it fits", "it does not fit")
    assert time.process_time() - began < 5


def test_a_model_of_absurd_size_is_refused(tmp_path, capsys):
    tree = json.loads((STUDENT / "config.json").read_text()) | {"num_hidden_layers": 10**30}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert main(["plan", str(DEMO), "--offline", f"student.model={tmp_path}"]) == 2
    assert "its config has num_hidden_layers = 1000000" in capsys.readouterr().err
