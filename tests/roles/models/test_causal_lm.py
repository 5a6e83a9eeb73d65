import json

import pytest
import torch
from torch import nn

from async_opd.core.errors import ConfigError, DataError
from async_opd.roles.models import causal_lm
from async_opd.roles.models.attention import SHORT, packed_segments

CPU = torch.device("cpu")
LENGTHS = [9, 1, 4]


@pytest.fixture
def load(tiny_lm, tmp_path):
    def load(family="Qwen3", **settings):
        """The same weights twice: with packed attention, and as transformers runs them by
        itself."""
        plain = tiny_lm(family, attn_implementation="eager", **settings).eval()
        plain.save_pretrained(tmp_path)
        return causal_lm.load(tmp_path, "float32", CPU), plain

    return load


@pytest.fixture
def ids_L():
    return torch.randint(40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def packed_logits(model, ids_L):
    return causal_lm.head(model).logits(causal_lm.hidden_states(model, ids_L, LENGTHS))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama", "Gemma", "Mixtral"])
@torch.no_grad()
def test_packed_segments_equal_each_segment_alone(load, ids_L, family, tied):
    packed, plain = load(family, tie_word_embeddings=tied)
    alone = torch.cat([plain(part[None]).logits[0] for part in ids_L.split(LENGTHS)])
    torch.testing.assert_close(packed_logits(packed, ids_L), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("GPT2", {}),  # learned positions, which must start anew in each segment
        # scores scaled by its own number
        ("Granite", dict(attention_multiplier=0.7, logits_scaling=1.0)),
    ],
)
@torch.no_grad()
def test_positions_and_scaling_are_those_of_the_model(load, ids_L, family, settings):
    packed, plain = load(family, **settings)
    alone = torch.cat([plain(part[None]).logits[0] for part in ids_L.split(LENGTHS)])
    torch.testing.assert_close(packed_logits(packed, ids_L), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_key_value_heads_may_be_shared_by_any_number_of_query_heads(load, ids_L, heads):
    packed, plain = load(num_key_value_heads=heads)
    alone = torch.cat([plain(part[None]).logits[0] for part in ids_L.split(LENGTHS)])
    torch.testing.assert_close(packed_logits(packed, ids_L), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_segments_are_the_sum_of_those_alone(load, ids_L, checkpointing):
    packed, plain = load()
    if checkpointing:
        packed.train().gradient_checkpointing_enable({"use_reentrant": False})
    packed_logits(packed, ids_L).square().mean().backward()
    torch.cat(
        [plain(part[None]).logits[0] for part in ids_L.split(LENGTHS)]
    ).square().mean().backward()
    for (name, got), (_, expected) in zip(
        packed.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("pad", [0, 1, -1])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma", "OPT", "Mixtral"])
def test_a_padding_id_costs_no_embedding_its_gradient(
    tiny_lm, tmp_path, ids_L, monkeypatch, family, pad
):
    """Of each embedding, against the sum over the places of its rows' gradient, made by hand."""
    settings = dict(word_embed_proj_dim=32, ffn_dim=48) if family == "OPT" else {}
    tiny_lm(family, tie_word_embeddings=False, **settings).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", pad_token_id=pad)
    if family == "OPT":  # it has no place for positions that start anew
        monkeypatch.setattr(causal_lm, "refuse_unless_packing_is_exact", lambda *_: None)
    model = causal_lm.load(tmp_path, "float32", CPU)
    ids_L[3] = ids_L[7] = pad % 40
    outputs = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, out: outputs.append(out) or out.retain_grad())
    packed_logits(model, ids_L).square().mean().backward()
    scale = 32**0.5 if family == "Gemma" else 1.0
    expected = torch.zeros(40, 32).index_add_(0, ids_L, outputs[0].grad[0] * scale)
    assert expected[pad].norm() > 0
    torch.testing.assert_close(embedding.weight.grad, expected)


@pytest.mark.parametrize("pad", [1, 2])
def test_with_tied_weights_too_the_padding_id_changes_no_gradient(tiny_lm, tmp_path, ids_L, pad):
    gradients = []
    tiny_lm(tie_word_embeddings=True).save_pretrained(tmp_path)
    for token in (0, pad):
        edit(tmp_path / "config.json", pad_token_id=token)
        model = causal_lm.load(tmp_path, "float32", CPU)
        ids_L[2:8:2] = pad
        packed_logits(model, ids_L).square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*gradients)


def test_weights_that_are_missing_or_of_another_shape_are_not_made_up(load, tmp_path):
    load()
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        (dict(num_hidden_layers=3), "its files lack 11 weights, such as model.layers.2.input_"),
        (dict(intermediate_size=50), r"6 weights have another shape .*\[32, 48\], not \[32, 50\]"),
    ):
        edit(tmp_path / "config.json", **(config | {"layer_types": None} | changes))
        with pytest.raises(DataError, match=message):
            causal_lm.load(tmp_path, "float32", CPU)


@torch.no_grad()
def test_tokens_of_one_segment_do_not_move_another(load, ids_L):
    packed, _ = load()
    before = packed_logits(packed, ids_L)
    ids_L[:9] = (ids_L[:9] + 1) % 40
    after = packed_logits(packed, ids_L)
    assert torch.equal(before[9:], after[9:]) and not torch.equal(before[:9], after[:9])


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
        ("Mistral", dict(sliding_window=8)),  # its config names no kinds of layers
        ("Gemma2", {}),  # every other layer slides
        ("Gemma2", dict(layer_types=["full_attention"] * 2)),  # soft-caps the attention scores
        # biased by distance, and never asks for our attention
        ("Bloom", dict(n_head=4, n_layer=2)),
        ("Granite", dict(logits_scaling=8.0)),  # the head is not all that makes its logits
        ("Mamba", dict(state_size=4)),
    ],
)
def test_a_model_that_packing_would_get_wrong_is_refused(load, family, settings):
    with pytest.raises(ConfigError, match="not supported"):
        load(family, **settings)


@torch.no_grad()
def test_the_head_soft_caps_logits_where_the_model_does(tiny_lm, ids_L):
    model = tiny_lm("Gemma2", final_logit_softcapping=2.0).eval()
    hidden = model.base_model(ids_L[None]).last_hidden_state
    logits = model(ids_L[None]).logits
    torch.testing.assert_close(causal_lm.head(model).logits(hidden), logits)
    assert 1 < logits.abs().max() < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [SHORT, SHORT + 1])
def test_attention_keeps_the_dtype_and_is_exact_to_its_rounding(dtype, length):
    torch.manual_seed(0)
    lengths = [length, 7]
    wide = [torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2)]
    inputs = [x.to(dtype).requires_grad_() for x in wide]
    out, _ = packed_segments(nn.Module(), *inputs, None, segment_lengths=lengths)
    assert out.dtype == dtype
    out.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = zip(*(x.split(lengths, 2) for x in exact), strict=True)
    scaled = nn.functional.scaled_dot_product_attention
    wanted = torch.cat(
        [scaled(*part, is_causal=True, enable_gqa=True).transpose(1, 2) for part in parts], 1
    )
    wanted.sum().backward()
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    for x, same in zip(inputs, exact, strict=True):
        assert x.grad is not None and x.grad.dtype == dtype
        error = (x.grad.double() - same.grad).norm() / same.grad.norm()
        assert error < tolerance
