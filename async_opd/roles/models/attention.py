"""Causal attention inside each of the segments packed along one row.

On a GPU in half precision torch's own kernel for such rows takes them as they lie. Elsewhere
segments are padded beside each other, short ones with short ones, for one fused call a group.
"""

import itertools
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from async_opd.core.errors import ConfigError
from async_opd.maths.packing import padded_groups

SHORT = 512  # tokens of a segment; longer ones are no slower in bfloat16
CAUSAL = (-1, 0)  # all that lies before, and nothing behind
WIDEST = 256  # of a head
CAPABLE = (8, 0)  # compute capability of Ampere


class Padded(NamedTuple):
    """Where packed tokens lie when segments are padded beside each other."""

    shapes: list[tuple[int, int]]  # segments and places of each group
    index_P: Tensor  # packed index of each place, group by group; padding shows token 0
    place_L: Tensor  # place of each packed token


class Segments(list[int]):
    """Lengths of the segments packed along one row, and what attention needs to know of them, made
    once for all layers. What goes to a GPU is written there without waiting for it."""

    def __init__(self, lengths: list[int]):
        super().__init__(lengths)
        self._made: dict[tuple[str, torch.device], Any] = {}

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        """Take `lengths` for what they are."""
        return lengths if isinstance(lengths, Segments) else cls(lengths)

    def ends(self, device: torch.device) -> Tensor:
        """Where each segment begins and the last ends, int32 [S + 1]."""
        key = "ends", device
        if key not in self._made:
            ends = [0, *itertools.accumulate(self)]
            self._made[key] = _put(np.array(ends, np.int32), device)
        return self._made[key]

    def positions(self, device: torch.device) -> Tensor:
        """Place of each token in its segment, int64 [L]."""
        return _put(np.concatenate([np.arange(length) for length in self]), device)

    def padded(self, device: torch.device) -> Padded:
        """Where tokens lie in groups of padded segments. Two gathers, because splitting and padding
        segment by segment costs a copy of everything per segment in backward."""
        key = "padded", device
        if key not in self._made:
            shapes, index_P, place_L = _layout(self)
            self._made[key] = Padded(shapes, _put(index_P, device), _put(place_L, device))
        return self._made[key]


def varlen_can(query: Tensor, value: Tensor) -> bool:
    """Tell whether torch's kernel for packed segments, which is FlashAttention's, takes heads such
    as these, [..., d]. The "meta" device stands for a GPU."""
    width = query.shape[-1]
    return (
        query.device.type in ("cuda", "meta")
        and query.dtype in (torch.bfloat16, torch.float16)
        and value.shape[-1] == width
        and width % 8 == 0
        and width <= WIDEST
        and not 192 < width <= 224  # backward, not on every card
        and (query.device.type == "meta" or _capable(query.device))
    )


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABLE


def packed_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: list[int],
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as a transformers attention function.

    `query` [1, H, L, d], `key` and `value` [1, H_kv, L, d], `segment_lengths` summing to L; where
    they are `Segments` all layers share what is made of them. Returns ([1, L, H, d], None). Raises
    ConfigError for `options` that would change the result.
    """
    if options.get("sliding_window") or options.get("softcap") or options.get("s_aux") is not None:
        raise ConfigError(
            "attention with a sliding window, soft-capped scores or sinks is not supported"
        )
    attend = varlen if varlen_can(query, value) else padded
    return attend(query, key, value, Segments.of(segment_lengths), scaling), None


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None = None
) -> Tensor:
    """Attend by `torch.nn.attention.varlen`, in shapes as `packed_segments`."""
    ends_S1, longest = segments.ends(query.device), max(segments)
    query_LHd, key_LHd, value_LHd = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        query_LHd,
        key_LHd,
        value_LHd,
        ends_S1,
        ends_S1,
        longest,
        longest,
        scale=scaling,
        window_size=CAUSAL,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def padded(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None = None
) -> Tensor:
    """Attend with segments padded beside each other to [S, H, T_max, d], in shapes as
    `packed_segments`. No [L, L] mask exists: a causal mask already hides the padding, which lies
    behind every real token."""
    layout = segments.padded(query.device)
    sizes = [count * longest for count, longest in layout.shapes]
    dtype = query.dtype
    # PyTorch's kernel for CPUs is up to 2.3 times as fast backwards in float32 as in bfloat16
    if query.device.type == "cpu" and max(segments) <= SHORT:
        dtype = torch.promote_types(dtype, torch.float32)

    def spread(x: Tensor) -> list[Tensor]:
        all_P = x[0].to(dtype).transpose(0, 1).index_select(0, layout.index_P)
        return [
            part.unflatten(0, shape).transpose(1, 2)
            for part, shape in zip(all_P.split(sizes), layout.shapes, strict=True)
        ]

    outs = [
        nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for part in zip(spread(query), spread(key), spread(value), strict=True)
    ]
    out_P = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out_P.index_select(0, layout.place_L).to(query.dtype)[None]


def _layout(lengths: list[int]) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Lay out the groups of `lengths`, as `Padded` has it."""
    length_S = np.array(lengths)
    start_S = length_S.cumsum() - length_S
    place_L = np.empty(length_S.sum(), np.int64)
    shapes: list[tuple[int, int]] = []
    index: list[np.ndarray] = []
    before = 0
    for part in padded_groups(lengths):
        at_T = np.arange(length_S[part].max())
        real_ST = at_T < length_S[part, None]
        index_ST = np.where(real_ST, start_S[part, None] + at_T, 0)
        place_L[index_ST[real_ST]] = before + np.flatnonzero(real_ST)
        shapes.append(index_ST.shape)
        index.append(index_ST.ravel())
        before += index_ST.size
    return shapes, np.concatenate(index), place_L


def _put(values: np.ndarray, device: torch.device) -> Tensor:
    """Write `values` to `device`, and to a GPU without waiting for what it does."""
    host = torch.tensor(values)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
