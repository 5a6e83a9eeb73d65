"""Parameters are counted exactly: against models that transformers makes, and against what is
published of them."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from async_opd import toy
from async_opd.core.errors import ConfigError
from async_opd.tools.plan.shape import _trees, local, read, shipped

SMALL = dict(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def made(tree: dict) -> int:
    config = AutoConfig.for_model(
        **{key: value for key, value in tree.items() if key != "contexts"}
    )
    with torch.device("meta"):
        return sum(
            weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters()
        )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=32)),
        ("mistral", {"head_dim": 16}),
        ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16)),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3", dict(head_dim=32, attention_bias=True)),
        ("qwen3_moe", EXPERTS | {"head_dim": 32}),
        ("qwen3_moe", EXPERTS | dict(head_dim=32, mlp_only_layers=[0])),
        ("qwen3_moe", EXPERTS | dict(head_dim=32, decoder_sparse_step=2)),
        ("gemma", {"head_dim": 32}),
    ],
)
def test_every_family_has_the_parameters_that_transformers_makes(family, settings, tied):
    tree = SMALL | dict(model_type=family, tie_word_embeddings=tied) | settings
    assert read(tree, "student.model").parameters == made(tree)


@pytest.mark.parametrize("tree", _trees(), ids=lambda tree: next(iter(tree["contexts"])))
def test_a_shipped_shape_of_two_layers_has_the_parameters_that_transformers_makes(tree):
    tree = tree | {"num_hidden_layers": 2}
    assert read(tree, "student.model").parameters == made(tree)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30_532_122_624),
        ("Qwen/Qwen3-235B-A22B", 235_093_634_560),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B", 72_706_203_648),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
    ],
)
def test_a_shipped_shape_has_the_published_number_of_parameters(model, parameters):
    assert shipped("student.model", model).parameters == parameters


def test_the_cache_of_a_token_is_a_key_and_a_value_of_each_head_and_layer():
    assert shipped("student.model", "Qwen/Qwen3-8B").kv_bytes(2) == 2 * 36 * 8 * 128 * 2 == 147_456
    assert shipped("student.model", "meta-llama/Llama-3.1-8B").kv_bytes(2) == 131_072


def test_the_demo_models_are_read_from_their_folders():
    tree = json.loads((toy.STUDENT / "config.json").read_text())
    assert local("student.model", "toy:student").parameters == made(tree)
    assert local("student.model", "Qwen/Qwen3-8B") is None


def test_a_model_that_is_not_shipped_is_refused_with_those_that_are():
    with pytest.raises(ConfigError) as raised:
        shipped("teacher.model", "Qwen/Qwen3-30B-A3B-Instruct-2506")
    assert (
        "teacher.model = 'Qwen/Qwen3-30B-A3B-Instruct-2506': --offline knows Qwen/Qwen3-0.6B, "
        in str(raised.value)
    )
    assert str(raised.value).endswith("did you mean 'Qwen/Qwen3-30B-A3B-Instruct-2507'?")


def test_a_family_that_cannot_be_counted_is_refused_by_name():
    with pytest.raises(
        ConfigError, match="plan cannot count a model of type 'mamba', only gemma, llama"
    ):
        read({"model_type": "mamba"}, "student.model")
    with pytest.raises(ConfigError, match="config says nothing of 'hidden_size'"):
        read(
            {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2},
            "student.model",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "its config cannot be read: TypeError: "),
        (
            {"num_hidden_layers": "three", "num_experts": 2},
            "its config cannot be read: TypeError: ",
        ),
        ({"num_attention_heads": 0}, "its config cannot be read: ZeroDivisionError: "),
    ],
)
def test_a_config_of_wrong_types_is_refused_in_words(changes, message):
    with pytest.raises(ConfigError, match=f"^student.model: {message}"):
        read(SMALL | {"model_type": "llama"} | changes, "student.model")


def test_a_config_without_a_size_says_which():
    with pytest.raises(
        ConfigError, match=r"^student.model: its config says nothing of 'vocab_size'$"
    ):
        read(
            {k: v for k, v in (SMALL | {"model_type": "llama"}).items() if k != "vocab_size"},
            "student.model",
        )
