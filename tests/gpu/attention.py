"""Attention inside packed segments: the learner's own, and torch's kernel for them."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from async_opd.roles.models import attention
from async_opd.roles.models.attention import Segments
from tests.gpu.place import GIB, Place, Record

LAST = 64  # queries of a segment that are compared where scores of all would not fit
MIXED = [300, 1, 77, 128]  # lengths at which everything is compared
ALLOWED = 2**-5  # bfloat16 has 8 bits, and values of normal deviates reach 4


def packed(place: Place, record: Record) -> None:
    """Every form of attention agrees with float64, forward and backward; its time and memory."""
    for form, attend in forms(place).items():
        inputs = projections(place, sum(MIXED))
        errors = {
            name: (mine.double() - exact).abs().max().item() / max(1.0, exact.abs().max().item())
            for name, mine, exact in zip(
                ("out", "query", "key", "value"),
                with_gradients(lambda *qkv, a=attend: a(*qkv, MIXED), inputs),
                with_gradients(lambda *qkv: exactly(*qkv, MIXED), [x.double() for x in inputs]),
                strict=True,
            )
        }
        record(f"{form}, segments of {MIXED}", **{f"error_{n}": e for n, e in errors.items()})
        assert all(error <= ALLOWED for error in errors.values()), f"{form}: off by {errors}"
    for kind, (form, attend) in itertools.product(("one", "even", "tail"), forms(place).items()):
        parts = place.lengths(kind)
        inputs = projections(place, place.tokens)
        leaves = [x.requires_grad_() for x in inputs]
        cost = place.timed(lambda a=attend, q=leaves, p=parts: a(*q, p).sum().backward())
        with torch.no_grad():
            out = attend(*inputs, parts)[0]
        gaps = [
            (out[stop - len(rows) : stop].double() - rows).abs().max().item()
            for stop, rows in last_rows(inputs, parts)
        ]
        record(f"{form}, {kind}", ms=1e3 * cost.seconds, gib=cost.gib, error=float(np.max(gaps)))
        assert all(gap <= ALLOWED for gap in gaps), f"{form}, {kind}: off by {gaps}"


def float32(place: Place, record: Record) -> None:
    """Whether float32 with grouped queries holds all scores, which a fused kernel does not."""
    tokens = place.tokens // 4
    query, key, value = projections(place, tokens, torch.float32)
    cost = place.timed(
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    )
    scores = 4 * query.shape[1] * tokens**2 / GIB
    record(
        f"{tokens} tokens",
        ms=1e3 * cost.seconds,
        gib=cost.gib,
        scores_gib=scores,
        holds_scores=float(cost.gib >= scores),
    )


def forms(place: Place) -> dict[str, Callable[..., Tensor]]:
    """Give the learner's two forms of attention, [1, L, H, d] of query, key, value [1, H, L, d] and
    lengths; a CPU has one."""

    def by(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, key, value, parts: attend(query, key, value, Segments(parts))

    kernels = {"varlen": by(attention.varlen)} if place.device == "cuda" else {}
    return {"padded": by(attention.padded), **kernels}


def projections(place: Place, tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Draw query, key and value [1, H, L, d]."""
    torch.manual_seed(0)
    shape = place.large
    heads = (shape["num_attention_heads"], *[shape["num_key_value_heads"]] * 2)
    return [
        torch.randn(1, h, tokens, shape["head_dim"], device=place.device, dtype=dtype)
        for h in heads
    ]


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Give what comes out, and the gradients of the sum of its squares."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def exactly(query: Tensor, key: Tensor, value: Tensor, parts: list[int]) -> Tensor:
    """Attend segment by segment in float64, with all scores."""
    ends = list(itertools.accumulate(parts))
    return torch.cat(
        [
            one_segment(*(x[:, :, stop - length : stop] for x in (query, key, value)), length)
            for length, stop in zip(parts, ends, strict=True)
        ],
        2,
    ).transpose(1, 2)


def last_rows(inputs: list[Tensor], parts: list[int]) -> list[tuple[int, Tensor]]:
    """Give where the first and the last segment end, and what their last queries attend to,
    [R, H, d] in float64."""
    ends = list(itertools.accumulate(parts))
    return [
        (
            ends[i],
            one_segment(
                *(x[:, :, ends[i] - parts[i] : ends[i]].double() for x in inputs),
                min(LAST, parts[i]),
            )[0].transpose(0, 1),
        )
        for i in {0, len(parts) - 1}
    ]


def one_segment(query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
    """Attend from the last `rows` of a segment's queries, [1, H, R, d]."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query[:, :, length - rows :] @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    ahead = torch.ones(rows, length, device=query.device).triu(length - rows + 1).bool()
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ values
