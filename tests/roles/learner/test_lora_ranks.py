"""Two real ranks over gloo train an adapter, under every stage of ZeRO."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.roles.learner.test_engine import STEPS, state_of, train  # noqa: F401 a fixture

pytestmark = pytest.mark.ray
LORA = (("rank", 16), ("alpha", 8.0))
DROPPING = (*LORA, ("dropout", 0.3))


def adapter(saved):
    return load_file(saved / "adapter_model.safetensors")


def logprobs(model):
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[5, 6, 7, 8, 9]])).logits[0]
    logp = torch.log_softmax(logits / 0.7, dim=-1)
    return [logp[2, 8].item(), logp[3, 9].item()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_of_any_zero_stage_train_an_adapter_like_one(train, stage):  # noqa: F811
    (one,), expected = train(1, 0, lora=LORA)
    both, saved = train(2, stage, lora=LORA)
    for rank in both:
        assert rank["before"] == pytest.approx(one["before"], abs=1e-5)
        for got, step in zip(rank["metrics"], one["metrics"], strict=True):
            assert got == pytest.approx(step, rel=1e-4, abs=1e-5)
        assert rank["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
        assert rank["base_stays"]
        # what leaves is, after each step, what the live student says, though that is apart from it
        assert len(rank["apart"]) >= STEPS and max(rank["apart"]) < 1e-5
        assert rank["gradient"]["unmoved"] and rank["loss"]["unmoved"]
    weights, wanted = adapter(saved), adapter(expected)
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=0, msg=name)
    assert one["logprobs"] != pytest.approx(one["before"], abs=1e-2)  # it has learned something
    # the optimizer has moments of the adapter, and of nothing else; ranks share them out
    trained = sum(weight.numel() for weight in wanted.values())
    assert one["masters"] == trained
    kept = [rank["masters"] for rank in both]
    assert kept == [trained] * 2 if stage == 0 else trained <= sum(kept) <= trained + 200
    assert [rank["held"] for rank in both] == [0 if stage == 3 else one["held"]] * 2


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_what_is_saved_loads_by_peft_and_merged_by_transformers(train, ranks, stage):  # noqa: F811
    (one, *_), saved = train(ranks, stage, lora=LORA)
    settings = json.loads((saved / "adapter_config.json").read_bytes())
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (16, 8, True)
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    assert logprobs(PeftModel.from_pretrained(base, saved)) == pytest.approx(
        one["logprobs"], abs=1e-5
    )
    whole = AutoModelForCausalLM.from_pretrained(saved.with_suffix(".whole"))
    assert logprobs(whole) == pytest.approx(one["logprobs"], abs=1e-5)
    assert not list(saved.glob("*model*.bin")) and not (saved / "config.json").exists()


RESUMED = [(1, 0, {}), (2, 2, {}), (2, 3, dict(dtype="bfloat16", gradient_checkpointing=True))]


@pytest.mark.parametrize(("ranks", "stage", "settings"), RESUMED)
def test_an_adapter_goes_on_from_a_saved_state_to_the_bit(train, ranks, stage, settings):  # noqa: F811
    """Though parts of what goes into it are dropped, at random."""
    unbroken, expected = train(ranks, stage, lora=DROPPING, **settings)
    resumed, saved = train(ranks, stage, lora=DROPPING, **settings, resume=state_of(expected))
    for got, whole in zip(resumed, unbroken, strict=True):
        assert got["metrics"] == whole["metrics"][3:] and len(got["metrics"]) == STEPS - 3
        assert (got["random"], got["logprobs"]) == (whole["random"], whole["logprobs"])
        assert max(whole["apart"], default=0) < 1e-5  # a probe drops nothing
    for name, weight in adapter(expected).items():
        assert torch.equal(adapter(saved)[name], weight), name


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_state_holds_the_adapter_alone(train, ranks, stage):  # noqa: F811
    _, saved = train(ranks, stage, lora=LORA)
    trained = sum(weight.nbytes for weight in adapter(saved).values())
    files = [file for file in state_of(saved).rglob("*.pt")]
    held = [torch.load(file, weights_only=False) for file in files]
    names = {name for each in held for name in each.get("module") or {}}
    assert names and all("lora_" in name or "rotary" in name for name in names)
    # the adapter, its master weights and two moments, and what says where they are
    assert sum(file.stat().st_size for file in files) < 5 * trained + 2**17
