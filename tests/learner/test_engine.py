import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from async_opd.collective import free_port
from async_opd.toy.tokenizer import build_tokenizer

pytestmark = pytest.mark.ray
STEPS = 5
SETTINGS = dict(lr=1e-3, grad_clip=2.0, warmup_steps=2, schedule="linear", micro_batch_tokens=20, weight_decay=0.1)


@pytest.fixture(scope="module")
def train(tiny_lm, tmp_path_factory):
    """Trains the same student on the same data, each rank in its own process, once for the same settings."""
    folder = tmp_path_factory.mktemp("ranks")
    model = folder / "student"
    tiny_lm().save_pretrained(model)
    build_tokenizer().save_pretrained(model)

    @cache
    def train(ranks, zero_stage, dtype="float32") -> tuple[list[dict], Path]:
        """Results of each rank, and where rank 0 saved the student."""
        job = dict(rendezvous=f"tcp://127.0.0.1:{free_port('127.0.0.1')}", model=str(model), steps=STEPS)
        settings = SETTINGS | dict(ranks=ranks, zero_stage=zero_stage, dtype=dtype)
        outs = [folder / f"{ranks}-{zero_stage}-{dtype}.{rank}" for rank in range(ranks)]
        jobs = [json.dumps(job | dict(settings=settings, rank=rank, out=str(out))) for rank, out in enumerate(outs)]
        script = Path(__file__).with_name("rank_process.py")
        processes = [subprocess.Popen([sys.executable, script, job]) for job in jobs]
        try:
            assert [process.wait(100) for process in processes] == [0] * ranks
        finally:
            for process in processes:
                process.kill()
        return [json.loads(out.read_text()) for out in outs], Path(f"{outs[0]}.model")

    return train


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_of_any_zero_stage_train_like_one(train, stage):
    (one,), expected = train(1, 0)
    both, saved = train(2, stage)
    assert one["micro_batches"] == 3 and [rank["micro_batches"] for rank in both] == [2, 2]
    for rank in both:
        for got, step in zip(rank["metrics"], one["metrics"], strict=True):
            assert got == pytest.approx(step, rel=1e-4, abs=1e-5)
        assert rank["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
    trained = weights(saved)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_before_the_weights_move(train, stage):
    for rank in train(2, stage)[0]:
        assert "gradient" in rank["gradient"]["error"]
        assert rank["gradient"]["unmoved"] and rank["gradient"]["version"] == STEPS


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_the_weights_move(train, stage):
    for rank in train(2, stage)[0]:
        assert rank["loss"] == dict(error="step 6: loss nan over 34 tokens", unmoved=True, version=STEPS)


def test_the_learning_rate_warms_up_and_then_falls_linearly(train):
    (one,), _ = train(1, 0)
    rates = [metrics["lr"] for metrics in one["metrics"]]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 6.666667e-4, 3.333333e-4])  # 0, 1/2, then (5 - step) / (5 - 2)


def test_metrics_count_the_lag_and_show_the_gradient_before_clipping(train):
    (one,), _ = train(1, 0)
    assert [metrics["lag_max"] for metrics in one["metrics"]] == [0, 1, 2, 3, 4]
    assert [metrics["tokens"] for metrics in one["metrics"]] == [34] * 5
    assert all(metrics["grad_norm"] > SETTINGS["grad_clip"] for metrics in one["metrics"])  # so clipping was at work


def test_a_saved_checkpoint_gives_the_log_probs_of_the_live_student(train):
    (one,), saved = train(1, 0)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0] / 0.7, dim=-1)
    assert one["logprobs"] == pytest.approx([logp[2, 8].item(), logp[3, 9].item()], abs=1e-5)
    assert not list(saved.parent.glob(".*.partial"))


def test_bfloat16_trains_much_like_float32_and_stops_at_the_same_faults(train):
    (one,), _ = train(1, 0)
    (half,), _ = train(1, 0, "bfloat16")
    for got, expected in zip(half["metrics"], one["metrics"], strict=True):
        assert got["kl"] == pytest.approx(expected["kl"], rel=0.05)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.15)
    assert "gradient" in half["gradient"]["error"] and half["gradient"]["unmoved"]
