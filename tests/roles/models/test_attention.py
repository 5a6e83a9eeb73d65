from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from async_opd.maths.packing import padded_groups
from async_opd.roles.models import attention, causal_lm
from async_opd.roles.models.attention import Segments, packed_segments
from tests.tensor_memory import TensorMemory

LENGTHS = [9, 1, 4]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "dtype", "width", "value_width", "capability", "chosen"),
    [
        ("cuda", torch.bfloat16, 128, 128, (9, 0), True),
        ("cuda", torch.float16, 256, 256, (8, 0), True),
        ("meta", torch.bfloat16, 64, 64, None, True),
        ("cpu", torch.bfloat16, 128, 128, None, False),
        ("cuda", torch.float32, 128, 128, (9, 0), False),
        ("cuda", torch.bfloat16, 512, 512, (9, 0), False),
        ("cuda", torch.bfloat16, 100, 100, (9, 0), False),
        ("cuda", torch.bfloat16, 208, 208, (8, 9), False),
        ("cuda", torch.bfloat16, 192, 128, (9, 0), False),  # latent attention
        ("cuda", torch.float16, 128, 128, (7, 5), False),
    ],
)
def test_segments_are_padded_only_where_no_kernel_takes_them_as_they_lie(
    monkeypatch, device, dtype, width, value_width, capability, chosen
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._capable.cache_clear()
    query, value = (
        SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 14, size))
        for size in (width, value_width)
    )
    assert attention.varlen_can(query, value) is chosen
    attention._capable.cache_clear()


def exact(query, key, value, ends, scale):
    """Causal attention of each segment alone; heads [L, H, d]."""
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        ).transpose(0, 1)
        for start, end in pairwise(ends)
    ]
    return torch.cat(parts)


def slopes(grad, query, key, value, ends, scale):
    """Gradients of `exact` by hand: no autograd below an operator."""
    shared = query.shape[1] // key.shape[1]
    results = [torch.zeros_like(x) for x in (query, key, value)]
    for start, end in pairwise(ends):
        for head in range(query.shape[1]):
            places = (slice(start, end), head), (slice(start, end), head // shared)
            q, g = query[places[0]].double(), grad[places[0]].double()
            k, v = key[places[1]].double(), value[places[1]].double()
            ahead = torch.ones(end - start, end - start).triu(1).bool()
            p = (scale * q @ k.T).masked_fill(ahead, -torch.inf).softmax(-1)
            toward = g @ v.T
            slope = p * (toward - (toward * p).sum(-1, keepdim=True))
            results[0][places[0]] += (scale * slope @ k).to(query.dtype)
            results[1][places[1]] += (scale * slope.T @ q).to(query.dtype)
            results[2][places[1]] += (p.T @ g).to(query.dtype)
    return tuple(results)


@pytest.fixture
def flash_on_cpu():
    """Torch's operators below `varlen_attn`, as they are documented, for a CPU; the list of what
    they were called with."""
    calls = []

    def checked(query, key, value, ends_q, ends_k, longest_q, longest_k, dropout, causal, how):
        assert ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k)
        assert longest_q == longest_k == int(ends_q.diff().max()) and dropout == 0 and causal
        assert (how["window_size_left"], how["window_size_right"]) == (-1, 0)
        for x in (query, key, value):
            assert x.dtype == torch.bfloat16 and x.stride(-1) == 1 and len(x) == ends_q[-1]
        assert query.shape[1] % key.shape[1] == 0
        return ends_q.tolist()

    def forward(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, debug, **how):
        ends = checked(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, how)
        calls.append(("forward", ends))
        out = exact(q.double(), k.double(), v.double(), ends, how["scale"]).to(q.dtype)
        return out, q.new_empty(q.shape[1], len(q), dtype=torch.float32), *[q.new_empty(0)] * 3

    def backward(
        grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal, *_, **how
    ):
        ends = checked(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout, causal, how)
        calls.append(("backward", ends))
        return slopes(grad, q, k, v, ends, how["scale"])

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_through_torchs_own_kernel_as_through_padding(
    tiny_lm, tmp_path, flash_on_cpu, monkeypatch, checkpointing
):
    """The kernel itself needs a card; what is above it is torch's own."""
    tiny_lm().save_pretrained(tmp_path)
    ids_L = torch.randint(40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    gradients = []
    for can in (False, True):
        model = causal_lm.load(tmp_path, "bfloat16", CPU).train()
        monkeypatch.setattr(attention, "varlen_can", lambda query, value, can=can: can)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden = causal_lm.hidden_states(model, ids_L, LENGTHS)
        causal_lm.head(model).logits(hidden).square().mean().backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    layers, ends = 2, [0, 9, 10, 14]
    kinds = ["forward"] * layers + (["forward", "backward"] if checkpointing else ["backward"]) * 2
    assert sorted(flash_on_cpu) == sorted((kind, ends) for kind in kinds)
    for name, gradient in gradients[0].items():
        apart = (gradients[1][name] - gradient).norm() / gradient.norm()
        assert apart < 0.03, name


def test_on_a_gpu_one_long_segment_among_short_ones_holds_no_padding():
    lengths, heads, width = [9000, *[300] * 30], 16, 128
    tokens = sum(lengths)
    query, key, value = (
        torch.empty(1, h, tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, heads // 2, heads // 2)
    )
    with TensorMemory() as held:
        out, _ = packed_segments(nn.Module(), query, key, value, None, segment_lengths=lengths)
        out.sum().backward()
    assert out.shape == (1, tokens, heads, width)
    assert held.most < 5 * query.nbytes  # out and its gradient, log-sums, gradients of q, k and v


@pytest.mark.parametrize("lengths", [[700, *[20] * 40, 690, *[25] * 100], [40, 7, 39]])
def test_short_segments_are_padded_among_themselves(lengths):
    torch.manual_seed(0)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    inputs = [torch.randn(1, h, ends[-1], 8, requires_grad=True) for h in (2, 1, 1)]
    segments = Segments(lengths)
    out = attention.padded(*inputs, segments)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    alone = [x.detach().clone().requires_grad_() for x in inputs]
    wanted = exact(*(x[0].transpose(0, 1) for x in alone), ends, None)[None]
    (wanted * weights).sum().backward()
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    for x, same in zip(inputs, alone, strict=True):
        torch.testing.assert_close(x.grad, same.grad, atol=1e-4, rtol=1e-4)
    padded = sum(len(part) * max(lengths[i] for i in part) for part in padded_groups(lengths))
    assert len(segments.padded(CPU).index_P) == padded


def test_what_attention_needs_is_made_once_for_all_layers():
    segments = Segments.of(LENGTHS)
    assert Segments.of(segments) is segments
    assert segments.ends(CPU) is segments.ends(CPU) and segments.padded(CPU) is segments.padded(CPU)
    assert segments.ends(CPU).tolist() == [0, 9, 10, 14]
    assert segments.positions(CPU).tolist() == [*range(9), 0, *range(4)]
