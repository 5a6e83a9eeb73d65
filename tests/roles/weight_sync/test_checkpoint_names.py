import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import ConversionOps, WeightConverter

from async_opd.core.errors import DataError
from async_opd.roles.weight_sync import checkpoint_names

EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = [
    ("Qwen3", dict(tie_word_embeddings=True)),
    ("Qwen3", {}),
    # two fused tensors a layer in memory, three for each expert in the checkpoint
    ("Qwen3Moe", EXPERTS),
    ("Mixtral", dict(num_local_experts=3)),  # renamed too
    ("HrmText", {}),  # the other way: the checkpoint is fused, the model is not
]


def exported(model):
    pieces = checkpoint_names.pieces(model)
    described = [meta for piece in pieces for meta in piece.tensors]
    tensors = checkpoint_names.tensors(model, pieces, dict(model.named_parameters()))
    return list(zip(described, tensors, strict=True))


@pytest.mark.parametrize(
    ("family", "settings"), FAMILIES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_weights_leave_under_the_names_and_shapes_of_the_saved_checkpoint(
    tiny_lm, tmp_path, family, settings
):
    model = tiny_lm(family, **settings)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for meta, tensor in exported(model):
        torch.testing.assert_close(tensor, saved.pop(meta.name), atol=0, rtol=0)
        assert (meta.shape, getattr(torch, meta.dtype)) == (tuple(tensor.shape), tensor.dtype)
    assert saved == {}


def test_a_tied_weight_leaves_once(tiny_lm):
    names = [meta.name for meta, _ in exported(tiny_lm(tie_word_embeddings=True))]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_what_the_checkpoint_fuses_goes_back_together_and_all_else_alone(tiny_lm):
    pieces = checkpoint_names.pieces(tiny_lm("HrmText"))
    fused = [len(piece.parameters) for piece in pieces if "qkv" in piece.tensors[0].name]
    assert fused and set(fused) == {4}
    assert {
        len(piece.parameters) for piece in checkpoint_names.pieces(tiny_lm("Qwen3Moe", **EXPERTS))
    } == {1}


class OneWay(ConversionOps):
    """A conversion that was never given a way back."""

    def convert(self, input_dict, **_):
        return input_dict


class Lossy(OneWay):
    """A way back that loses half of the weight."""

    @property
    def reverse_op(self):
        return self

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0][::2]}


@pytest.mark.parametrize(
    ("operation", "complaint"),
    [
        (OneWay, "student.model: no way back to a checkpoint for .*NotImplementedError"),
        (
            Lossy,
            (
                "student.model: model.layers.0.mlp.down_proj.weight does not come back whole as"
                " model.layers.0.mlp.w2"
            ),
        ),
    ],
)
def test_a_weight_without_a_way_back_is_refused_by_name(tiny_lm, operation, complaint):
    model = tiny_lm()
    model._weight_conversions = [
        WeightConverter("mlp.w2.weight", "mlp.down_proj.weight", [operation()])
    ]
    with pytest.raises(DataError, match=complaint):
        checkpoint_names.pieces(model)
