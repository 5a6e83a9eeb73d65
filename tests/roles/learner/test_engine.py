import json
import shutil
import uuid
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from async_opd.core.errors import CheckpointError, ConfigError
from async_opd.driver.checkpoints import Checkpoints, RunState, find
from async_opd.roles.learner.deepspeed_config import refused
from async_opd.toy.tokenizer import build_tokenizer
from tests.roles.learner import rank_process
from tests.roles.learner.forked import run_ranks

pytestmark = pytest.mark.ray
STEPS = 5
SETTINGS = dict(
    lr=1e-3,
    grad_clip=2.0,
    warmup_steps=2,
    schedule="linear",
    micro_batch_tokens=20,
    weight_decay=0.1,
)


EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=True
)


@pytest.fixture(scope="module")
def train(tiny_lm, tmp_path_factory):
    """Trains the same student on the same data, each rank in its own process, once for the same
    settings."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def student(family):
        model = folder / family
        tiny_lm(family, **(EXPERTS if family == "Qwen3Moe" else {})).save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        return str(model)

    @cache
    def train(
        ranks,
        zero_stage,
        dtype="float32",
        family="Qwen3",
        objective="opd",
        lopsided=False,
        resume=None,
        lora=None,
        **settings,
    ) -> tuple[list[dict], Path]:
        """Results of each rank, and where rank 0 saved the student."""
        settings = SETTINGS | dict(ranks=ranks, zero_stage=zero_stage, dtype=dtype) | settings
        job = dict(
            model=student(family),
            steps=STEPS,
            settings=settings,
            objective=objective,
            lopsided=lopsided,
            lora=lora and dict(lora),
        )
        job |= dict(resume=resume and str(resume), meeting=str(folder / uuid.uuid4().hex))
        name = f"{ranks}-{zero_stage}-{dtype}-{family}-{objective}{'-resumed' if resume else ''}"
        name += f"-{lora}".translate(dict.fromkeys(map(ord, "(), '"))) if lora else ""
        outs = [folder / f"{name}.{rank}" for rank in range(ranks)]
        jobs = [job | dict(rank=rank, out=str(out)) for rank, out in enumerate(outs)]
        run_ranks(rank_process, jobs)
        return [json.loads(out.read_text()) for out in outs], Path(f"{outs[0]}.model")

    return train


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def state_of(saved):
    """Where the ranks that left `saved` saved their state."""
    return saved.with_name(saved.name.replace(".0.model", ".state"))


def check_equal(alone, sharded):
    """Metrics, log-probs and checkpoint of two ranks are those of one."""
    ((one,), expected), (both, saved) = alone, sharded
    for rank in both:
        assert rank["before"] == pytest.approx(one["before"], abs=1e-5)
        for got, step in zip(rank["metrics"], one["metrics"], strict=True):
            assert got == pytest.approx(step, rel=1e-4, abs=1e-5)
        assert rank["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
    trained = weights(saved)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_any_zero_stage_train_like_one(train, stage):
    check_equal(train(1, 0), train(2, stage))
    (one,), (both, _) = train(1, 0)[0], train(2, stage)
    assert one["micro_batches"] == 3 and [rank["micro_batches"] for rank in both] == [2, 2]
    assert [rank["held"] for rank in both] == [0 if stage == 3 else one["held"]] * 2


def test_experts_shared_embeddings_statistics_and_an_idle_rank_are_no_trouble_to_zero_3(
    train,
):
    """Nor are the optimizer on the host, activation checkpointing and a head that is read in
    chunks."""
    common = dict(family="Qwen3Moe", objective="centred")
    frugal = dict(
        lopsided=True, offload_optimizer=True, gradient_checkpointing=True, head_chunk_rows=3
    )
    check_equal(train(1, 0, **common), train(2, 3, **common, **frugal))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both_before_the_weights_move(train, stage):
    for rank in train(2, stage)[0]:
        assert "gradient" in rank["gradient"]["error"]
        assert rank["gradient"]["unmoved"] and rank["gradient"]["version"] == STEPS + 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_before_the_weights_move(train, stage):
    for rank in train(2, stage)[0]:
        assert rank["loss"] == dict(
            error="step 7: loss nan over 34 tokens", unmoved=True, version=STEPS + 1
        )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_keeps_no_token_moves_nothing_and_is_no_divergence(train, stage):
    for rank in train(2, stage)[0]:
        nothing = rank["nothing"]
        assert (nothing["error"], nothing["unmoved"]) == (None, True)
        assert (nothing["version"], nothing["tokens"]) == (STEPS + 1, 0)
        assert (nothing["tokens_excluded"], nothing["grad_norm"], nothing["loss"]) == (34, 0, 0)


def test_the_learning_rate_warms_up_and_then_falls_linearly(train):
    (one,), _ = train(1, 0)
    rates = [metrics["lr"] for metrics in one["metrics"]]
    # 0, 1/2, then (5 - step) / (5 - 2)
    assert rates == pytest.approx([0, 5e-4, 1e-3, 6.666667e-4, 3.333333e-4])


def test_metrics_count_the_lag_and_show_the_gradient_before_clipping(train):
    (one,), _ = train(1, 0)
    assert [metrics["lag_max"] for metrics in one["metrics"]] == [0, 1, 2, 3, 4]
    assert [metrics["tokens"] for metrics in one["metrics"]] == [34] * 5
    # so clipping was at work
    assert all(metrics["grad_norm"] > SETTINGS["grad_clip"] for metrics in one["metrics"])


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_rank_0_records_two_trajectories_of_every_second_step(train, ranks, stage):
    first, *others = train(ranks, stage)[0]
    assert [step for step, *_ in first["recorded"]] == [2, 2, 4, 4]
    for _, _, names in first["recorded"]:
        assert {
            "student",
            "behaviour",
            "teacher",
            "advantage",
            "weight",
            "selected",
            "version",
        } <= set(names)
    assert [rank["recorded"] for rank in others] == [[]] * (ranks - 1)


def test_a_saved_checkpoint_gives_the_log_probs_of_the_live_student(train):
    (one,), saved = train(1, 0)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0] / 0.7, dim=-1)
    assert one["logprobs"] == pytest.approx([logp[2, 8].item(), logp[3, 9].item()], abs=1e-5)
    assert not list(saved.parent.glob(".*.partial"))


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_bfloat16_trains_much_like_float32_and_stops_at_the_same_faults(train, ranks, stage):
    (one,), _ = train(1, 0)
    half, *_ = train(ranks, stage, "bfloat16")[0]
    for got, expected in zip(half["metrics"], one["metrics"], strict=True):
        assert got["kl"] == pytest.approx(expected["kl"], rel=0.05)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.15)
    assert "gradient" in half["gradient"]["error"] and half["gradient"]["unmoved"]
    assert half["accumulates"] == "torch.float32"


RESUMED = [
    (1, 0, {}),
    (1, 2, dict(objective="remembering")),
    (2, 2, {}),
    (2, 3, {}),
    (2, 3, dict(dtype="bfloat16", offload_optimizer=True)),
]


@pytest.mark.parametrize(("ranks", "stage", "settings"), RESUMED)
def test_a_new_learner_goes_on_from_a_saved_state_as_if_nothing_had_happened(
    train, ranks, stage, settings
):
    unbroken, expected = train(ranks, stage, **settings)
    resumed, saved = train(ranks, stage, **settings, resume=state_of(expected))
    for got, whole in zip(resumed, unbroken, strict=True):
        assert len(got["metrics"]) == STEPS - 3
        for after, step in zip(got["metrics"], whole["metrics"][3:], strict=True):
            assert after == pytest.approx(step, rel=1e-6, abs=1e-6)
        for name in ("random", "running", "logprobs"):
            assert got[name] == pytest.approx(whole[name], abs=1e-6)
    trained = weights(saved)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(trained[name], weight, atol=1e-6, rtol=0, msg=name)
    assert len({tuple(rank["random"]) for rank in unbroken}) == ranks  # each goes on with its own


def test_moments_that_a_run_has_not_measured_begin_where_it_goes_on_with_another_objective(train):
    before = train(1, 2)[1]
    ((whole,), _), ((got,), _) = (
        train(1, 2, objective="remembering", **more) for more in ({}, dict(resume=state_of(before)))
    )
    assert len(got["metrics"]) == STEPS - 3
    number, mean, _ = whole["running"]
    assert got["running"][:2] == pytest.approx([number * (STEPS - 3) / STEPS, mean])


def test_a_flipped_bit_in_any_file_of_a_state_is_found_before_torch_reads_it(train, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    shutil.copytree(state_of(train(2, 3)[1]), checkpoints.begin(3) / "learner")
    checkpoints.commit(3, RunState(version=3, position={}, outstanding=[]))
    folder, _ = find(tmp_path)
    files = [path for path in (folder / "learner").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json"] * 2 + [".pt"] * 4 + [".py"] * 2
    for file in files:
        whole = bytearray(file.read_bytes())
        damaged = whole[:]
        damaged[len(whole) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name):
            find(tmp_path)
        file.write_bytes(whole)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])
def test_a_state_that_finds_no_room_on_the_disk_is_an_error_with_a_name(train, ranks, stage):
    results, _ = train(ranks, stage)
    *others, full = [result["full"] for result in results]
    assert ".full" in full and "cannot be written: " in full
    # nor do they wait for the one whose disk is full: all of them went on behind it
    assert others == [None] * (ranks - 1)


def test_what_deepspeed_refuses_is_a_mistake_of_its_table_where_there_is_one():
    with (
        pytest.raises(
            ConfigError, match=r"^learner\.deepspeed = {'a': 1}: refused by DeepSpeed: no$"
        ),
        refused({"a": 1}),
    ):
        raise AssertionError("no")
    with pytest.raises(AssertionError), refused({}):
        raise AssertionError("no")
