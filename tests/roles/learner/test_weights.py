"""What of a student with an adapter travels, and that it is enough for who has the base."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from async_opd.core.errors import DataError
from async_opd.core.lora import LoraConfig
from async_opd.roles.learner import lora
from async_opd.roles.learner.weights import AdapterAlone, StudentWeights, travelling
from async_opd.roles.weight_sync.gloo import Piece

BUCKET = 6000
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj"]


class Gather:
    """Has what is asked for whole, and notes the most bytes of it at once."""

    most = 0

    @contextmanager
    def __call__(self, parameters):
        self.most = max(self.most, sum(each.nbytes for each in parameters))
        yield


def student(tiny_lm, family="Qwen3", *, dtype="float32", modules="all-linear", **settings):
    """A model, and the same with an adapter that has moved."""
    base = tiny_lm(family, **settings).to(getattr(torch, dtype))
    adapted = copy.deepcopy(base)
    lora.wrap(adapted, LoraConfig(rank=3, alpha=6, target_modules=modules), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    return base, adapted


def sent(weights) -> dict[str, torch.Tensor]:
    layout = weights.layout()
    arrived = dict(zip(layout.names, weights.tensors(), strict=True))
    assert layout.nbytes == sum(tensor.nbytes for tensor in arrived.values())
    assert [tuple(t.shape) for t in arrived.values()] == list(layout.shapes)
    return arrived


@pytest.mark.parametrize(
    ("family", "modules", "layers"),
    [
        ("Qwen3", "all-linear", [*QKV, "self_attn.o_proj", *MLP, "mlp.down_proj"]),
        ("Qwen2", ("q_proj",), QKV),
        ("Llama", ("up_proj", "o_proj"), ["self_attn.o_proj", *MLP]),
        ("Gemma", ("layers.1.mlp.down_proj",), ["mlp.down_proj"]),
        ("Qwen3Moe", "all-linear", [*QKV, "self_attn.o_proj"]),
    ],
)
def test_merged_only_what_an_engine_has_to_take_travels(tiny_lm, family, modules, layers):
    """All of the layers that it makes one of, biases too; no embedding, head, norm or expert."""
    experts = dict(num_experts=4, moe_intermediate_size=16) if family == "Qwen3Moe" else {}
    base, adapted = student(tiny_lm, family, modules=modules, **experts)
    one = any("." in name for name in modules)
    wanted = {
        name
        for name, _ in base.named_parameters()
        if any(f".{layer}." in name for layer in layers) and (not one or ".1." in name)
    }
    assert set(sent(StudentWeights(adapted, BUCKET, Gather())).keys()) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "down_proj")])
def test_the_base_with_what_travels_is_the_student_and_the_base_of_the_learner_stays(
    tiny_lm, dtype, modules
):
    base, adapted = student(tiny_lm, dtype=dtype, modules=modules)
    before = {name: weight.clone() for name, weight in lora.plain(adapted).items()}
    arrived = sent(StudentWeights(adapted, BUCKET, Gather()))
    assert all(torch.equal(w, before[name]) for name, w in lora.plain(adapted).items())
    base.load_state_dict(arrived, strict=False)
    for name, adapter in lora.adapters(adapted).items():
        delta = 2 * adapter.b_OR.double() @ adapter.a_RI.double()
        whole = (before[name].double() + delta).float().to(before[name].dtype)
        close = 1e-6 if dtype == "float32" else 1e-2
        torch.testing.assert_close(base.get_parameter(name), whole, atol=close, rtol=close)
    if dtype == "float32":
        ids = torch.arange(3, 20)[None]
        torch.testing.assert_close(base(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_student_without_an_adapter_sends_all_its_weights(tiny_lm):
    base = tiny_lm()
    assert set(sent(StudentWeights(base, BUCKET, Gather()))) == set(dict(base.named_parameters()))
    pieces = [Piece(("a",), ()), Piece(("b",), ())]
    assert travelling(pieces, ()) == pieces


def test_of_layers_that_are_not_known_those_of_their_block_travel_and_experts_do_not():
    names = ["h.attn.c_attn", "h.attn.c_proj", "h.mlp.router", "h.mlp.shared", "h.ln"]
    pieces = [Piece((f"{name}.weight",), ()) for name in names]
    pieces += [Piece((f"h.mlp.experts.{name}",), ()) for name in ("gate_up_proj", "down_proj")]
    assert travelling(pieces, ["h.attn.c_attn.weight"]) == pieces[:2]
    assert travelling(pieces, ["h.mlp.shared.weight"]) == pieces[2:4]


@pytest.mark.parametrize("tied", [True, False])
def test_alone_a_and_b_travel_by_pefts_names_with_the_scale_in_b(tiny_lm, tied):
    base, adapted = student(tiny_lm, tie_word_embeddings=tied)
    gather = Gather()
    weights = AdapterAlone(adapted, BUCKET, gather)
    assert weights.layout().adapter
    arrived = sent(weights)
    assert gather.most <= BUCKET < sum(tensor.nbytes for tensor in arrived.values())
    names = {name.removesuffix(".weight") for name in lora.adapters(adapted)}
    halves = {f"base_model.model.{n}.lora_{half}.weight" for n in names for half in "AB"}
    assert set(arrived) == halves
    layer = "model.layers.1.mlp.up_proj"
    a, b = (arrived[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
    x = torch.randn(5, a.shape[1])
    there = functional.linear(x, base.get_parameter(f"{layer}.weight")) + x @ a.T @ b.T
    torch.testing.assert_close(there, adapted.get_submodule(layer)(x), atol=1e-5, rtol=1e-5)


def test_alone_far_less_travels_than_merged_and_merged_less_than_all(tiny_lm):
    base, adapted = student(tiny_lm, vocab_size=400)
    alone = AdapterAlone(adapted, BUCKET, Gather()).layout().nbytes
    merged = StudentWeights(adapted, BUCKET, Gather()).layout().nbytes
    whole = StudentWeights(base, BUCKET, Gather()).layout().nbytes
    assert 3 * alone < merged < 0.6 * whole


def test_an_adapter_beside_a_weight_that_its_checkpoint_has_in_parts_does_not_travel_alone(tiny_lm):
    _, adapted = student(tiny_lm)
    weights = StudentWeights(adapted, BUCKET, Gather())
    (piece,) = [p for p in weights._pieces if "layers.0.mlp.up_proj" in p.parameters[0]]
    parts = Piece(piece.parameters, (piece.tensors[0], piece.tensors[0]))
    pieces = [parts if p is piece else p for p in weights._pieces]
    with pytest.MonkeyPatch.context() as patch:
        pieces_of = "async_opd.roles.weight_sync.checkpoint_names.pieces"
        patch.setattr(pieces_of, lambda *_: pieces)
        with pytest.raises(
            DataError, match=r"'adapter': that of .*up_proj.* with 'merged' it does"
        ):
            AdapterAlone(adapted, BUCKET, Gather())
