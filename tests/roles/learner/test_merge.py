"""An adapter made one model with its base."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from async_opd.roles.learner.merge import merge
from async_opd.toy.tokenizer import build_tokenizer

GLM = dict(
    moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1
)
KEPT = "model.layers.1.mlp.gate.e_score_correction_bias"  # in float32, whatever the rest is in


@pytest.fixture
def adapter(tiny_lm, tmp_path):
    """The folder of one, beside a model some of which is never in bfloat16."""
    vocabulary = dict(vocab_size=len(build_tokenizer()), eos_token_id=1, pad_token_id=0)
    lm = tiny_lm("Glm4Moe", **GLM, **vocabulary)
    lm.get_buffer(KEPT).copy_(torch.tensor([1.001, 0.5, 0.3, 0.7]))
    lm.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    settings = dict(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(lm, peft.LoraConfig(r=2, **settings)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_never_in_bfloat16_is_not_once_it_is_merged(adapter, tmp_path):
    merge("it", adapter, tmp_path / "out", "bfloat16", trust_remote_code=False)
    merged, base = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "base"))
    assert torch.equal(merged[KEPT], base[KEPT]) and merged[KEPT].dtype == torch.float32
    others = {weight.dtype for name, weight in merged.items() if name != KEPT}
    assert others == {torch.bfloat16}
    moved = {
        name for name, weight in merged.items() if not torch.equal(weight, base[name].bfloat16())
    }
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} | {KEPT}


def test_no_card_is_touched(adapter, tmp_path, monkeypatch):
    """Where there is one, peft reads an adapter to it, and a run's driver would hold memory there
    from then on."""

    def looked():
        raise AssertionError("a card")

    monkeypatch.setattr("peft.peft_model.infer_device", looked)
    merge("it", adapter, tmp_path / "out", "bfloat16", trust_remote_code=False)
