"""Estimates of a forward and backward against the learner's own step, on fake tensors."""

import pytest

from async_opd.core.lora import LoraConfig
from async_opd.core.wire import Needs
from async_opd.tools.plan.shape import _shipped
from tests.tools.plan.fake_step import Step

FEW = {"num_hidden_layers": 4}
QWEN3 = _shipped()["Qwen/Qwen3-1.7B"]
LLAMA = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=False,
)
GEMMA = dict(
    model_type="gemma",
    hidden_size=3072,
    intermediate_size=24576,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
    vocab_size=256000,
    tie_word_embeddings=True,
)
# of which the head is most
NARROW = dict(
    model_type="qwen3",
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=65536,
    max_position_embeddings=16384,
    tie_word_embeddings=True,
)
LORA = LoraConfig(rank=16)
DROPS = LoraConfig(rank=16, dropout=0.1)
SOME = LoraConfig(rank=128, target_modules=("q_proj", "v_proj"))
LONG_AND_SHORT = (2048, *[256] * 8)


@pytest.mark.parametrize(
    ("tree", "lengths", "rest"),
    [
        (QWEN3, (16384,), {}),
        (QWEN3, (8192, *[256] * 32), {}),  # packed: no place is padded
        (QWEN3, LONG_AND_SHORT, dict(dtype="float32", checkpointing=False)),  # and scores not fused
        (QWEN3, (4096,), dict(needs=Needs(student_entropy=True))),
        (_shipped()["Qwen/Qwen3-8B"], (4096,), {}),
        (_shipped()["Qwen/Qwen3-30B-A3B"], (4096,), dict(checkpointing=False)),
        (LLAMA, (4096,), {}),
        (GEMMA, (4096,), dict(checkpointing=False)),
        (NARROW, (16384,), {}),
        (NARROW, (1024,), {}),
        (NARROW, (16384,), dict(needs=Needs(student_entropy=True))),
        (NARROW, (512,) * 16, dict(dtype="float32")),
        (LLAMA, (2048,), dict(lora=LORA)),
        (QWEN3, (2048,), dict(lora=DROPS, checkpointing=False)),
        (QWEN3, (2048,), dict(lora=SOME, checkpointing=False)),
    ],
)
def test_a_forward_and_backward_hold_what_is_estimated(tree, lengths, rest):
    step = Step(**dict(tree=tree | FEW, lengths=lengths, checkpointing=True) | rest)
    assert step.planned() == pytest.approx(step.measured(), rel=0.1)
