"""A transformers causal LM run on packed segments: shared by the learner's student and the
teacher's scorer."""

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from async_opd.core.errors import ConfigError, DataError
from async_opd.core.foreign import foreign
from async_opd.maths.logprobs import Head

ATTENTION = "packed_segments"
SHORT = 512  # tokens of a segment; longer ones are no slower in bfloat16


def load(
    path: str | Path, dtype: str, device: torch.device, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load the causal LM at `path` (local directory or hub id) with attention that never crosses a
    segment.

    Raises as `read`, and ConfigError for a model whose attention is not plain causal (state space,
    biased) or that scales its logits: log-probs from packed segments would be silently wrong.
    """
    called = f"model {path}"
    model = read(called, path, dtype, trust_remote_code=trust_remote_code)
    model = model.to(device)  # pyright: ignore[reportArgumentType] its decorator hides `self`
    with foreign(f"{called}: cannot be run on packed segments", ConfigError):
        _refuse_unless_packing_is_exact(model, called)
    return model


def read(
    called: str,
    path: str | Path,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> PreTrainedModel:
    """Read the causal LM at `path`, which messages name by `called`, on the host.

    Without its `weights` it is on the meta device: of those in a local directory names and shapes
    are looked at, those of the hub are not asked for. Raises DataError for files that transformers
    cannot read, and for weights that are missing (it would make some up) or of another shape, and
    ConfigError for layers without full attention (sliding window, chunked).
    """
    model, info = _made(called, path, dtype, trust_remote_code=trust_remote_code, weights=weights)
    _refuse_other_weights(called, info)
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "use_sliding_window", False):
        raise ConfigError(
            f"{called}: layers {sorted(kinds)} are not supported; only full causal attention is"
        )
    _give_padding_its_gradient(model)
    return model


def check_weights(called: str, path: str, dtype: str, *, trust_remote_code: bool = False) -> None:
    """Raise DataError for weights in a local directory that are missing or of another shape, which
    vLLM would make up in silence. A config that transformers makes no model of, vLLM may."""
    try:
        _, info = _made(called, path, dtype, trust_remote_code=trust_remote_code, weights=False)
    except DataError:
        return
    _refuse_other_weights(called, info)


def _made(
    called: str, path: str | Path, dtype: str, *, trust_remote_code: bool, weights: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make a model as `read` does, and say how its files fit it. Raises DataError where
    transformers cannot."""
    settings: dict[str, Any] = dict(
        dtype=getattr(torch, dtype),
        attn_implementation=ATTENTION,
        trust_remote_code=trust_remote_code,
    )
    info: dict[str, Any] = {}
    with foreign(called):
        if weights or Path(path).is_dir():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                device_map=None if weights else "meta",
                **settings,
            )
            model, info = loaded
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **settings)
    return model, info


def _refuse_other_weights(called: str, info: dict[str, Any]) -> None:
    """Raise DataError where files do not fit a model, by what transformers says of them."""
    if missing := sorted(info.get("missing_keys", ())):
        raise DataError(f"{called}: its files lack {len(missing)} weights, such as {missing[0]}")
    if other := sorted(info.get("mismatched_keys", ())):
        name, stored, wanted = other[0]
        raise DataError(
            f"{called}: {len(other)} weights have another shape than its config says, such as"
            f" {name}: {list(stored)}, not {list(wanted)}"
        )


def _give_padding_its_gradient(model: PreTrainedModel) -> None:
    """Have every embedding learn the row of the padding id like any other: packed rows hold no
    padding, and in most families that id is an end token too."""
    for module in model.modules():
        if hasattr(module, "weight") and hasattr(module, "padding_idx"):
            vars(module)["padding_idx"] = None


@torch.no_grad()
def _refuse_unless_packing_is_exact(model: PreTrainedModel, called: str) -> None:
    """Compare the second of two packed segments with the model's own logits of it alone, on a few
    tokens."""
    ids_L = torch.tensor([2, 3, 4, 0, 1], device=model.device)
    packed = head(model).logits(hidden_states(model, ids_L, [3, 2])[3:])
    alone = model(input_ids=ids_L[None, 3:], use_cache=False, segment_lengths=[2]).logits[0].float()
    gap, largest = (packed - alone).abs().max().item(), alone.abs().max().item()
    # Rounding in bfloat16 stays below; a missed bias, mask or scale does not.
    if not gap <= 0.1 * largest:
        raise ConfigError(
            f"{called}: packed logits are off by {gap:.3g} (largest {largest:.3g}); not supported"
        )


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
    """Attend causally inside each of the segments packed along one row, as a transformers attention
    function.

    `query` [1, H, L, d], `key` and `value` [1, H_kv, L, d], `segment_lengths` summing to L.
    FlashAttention takes them as they lie, where it is installed and can. Otherwise segments are
    padded beside each other to [S, H, T_max, d] for one fused call, so no [L, L] mask exists: a
    causal mask already hides the padding, which lies behind every real token. Returns ([1, L, H,
    d], None). Raises ConfigError for `options` that would change the result.
    """
    if options.get("sliding_window") or options.get("softcap") or options.get("s_aux") is not None:
        raise ConfigError(
            "attention with a sliding window, soft-capped scores or sinks is not supported"
        )
    if flash_can(query):
        return _flash(query, key, value, tuple(segment_lengths), scaling), None

    grid_ST, place_L = _layout(tuple(segment_lengths), query.device)
    dtype = query.dtype
    # PyTorch's kernel for CPUs is up to 2.3 times as fast backwards in float32 as in bfloat16
    if query.device.type == "cpu" and max(segment_lengths) <= SHORT:
        dtype = torch.promote_types(dtype, torch.float32)

    def spread(x: Tensor) -> Tensor:
        return (
            x[0]
            .to(dtype)
            .transpose(0, 1)
            .index_select(0, grid_ST.flatten())
            .unflatten(0, grid_ST.shape)
            .transpose(1, 2)
        )

    out = nn.functional.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)
    return out.flatten(0, 1).index_select(0, place_L).to(query.dtype)[None], None


def flash_can(query: Tensor) -> bool:
    """Tell whether FlashAttention is installed and takes such heads, [..., d]."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and is_flash_attn_2_available()
    )


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: tuple[int, ...],
    scaling: float | None,
) -> Tensor:
    # Installed with GPUs only.
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    ends_S1, longest = _bounds(segment_lengths, query.device), max(segment_lengths)
    return flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (query, key, value)),  # [L, H, d]
        cu_seqlens_q=ends_S1,
        cu_seqlens_k=ends_S1,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        causal=True,
    )[None]


@lru_cache(maxsize=2)
def _bounds(segment_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """List where each segment begins and the last ends, int32 [S + 1]."""
    return torch.tensor(
        [0, *itertools.accumulate(segment_lengths)], dtype=torch.int32, device=device
    )


@lru_cache(maxsize=2)
def _layout(segment_lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Find the packed index of each place beside each other [S, T_max] (padding shows token 0), and
    each token's place [L].

    Two gathers, because splitting and padding segment by segment costs a copy of everything per
    segment in backward.
    """
    length_S = torch.tensor(segment_lengths)
    at_T = torch.arange(max(segment_lengths))
    real_ST = at_T < length_S[:, None]
    grid_ST = torch.where(real_ST, (length_S.cumsum(0) - length_S)[:, None] + at_T, 0)
    return grid_ST.to(device), real_ST.flatten().nonzero().squeeze(1).to(device)


AttentionInterface.register(ATTENTION, packed_segments)


def segments(
    pairs: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Join each prompt and its response, ids [P] and [T], to one segment [P + T]; returns these,
    one token where there are none, and the rows [T], in L, that predict each response."""
    starts = np.cumsum([0, *(len(prompt) + len(response) for prompt, response in pairs)])
    rows = [
        start + len(prompt) - 1 + np.arange(len(response))
        for start, (prompt, response) in zip(starts, pairs, strict=False)
    ]
    return [np.concatenate(pair) for pair in pairs] or [np.zeros(1, np.int32)], rows


def hidden_states(model: PreTrainedModel, ids_L: Tensor, segment_lengths: list[int]) -> Tensor:
    """Run segments packed in one row to their last hidden states [L, D] (after the final norm, what
    the head reads)."""
    return model.base_model(
        input_ids=ids_L[None],
        position_ids=torch.cat(
            [torch.arange(length, device=ids_L.device) for length in segment_lengths]
        )[None],
        use_cache=False,
        segment_lengths=segment_lengths,
    ).last_hidden_state[0]


def head(model: PreTrainedModel) -> Head:
    """Read the map from hidden states [·, D] to logits [·, V], soft-capped where the model's are
    (Gemma).

    The weight, not the module: ZeRO-3 gathers at every call of a module, and it must not gather at
    every chunk, of which each rank has its own number. Read like this, the weight counts as the
    calling module's own.
    """
    project = model.get_output_embeddings()
    assert project is not None  # as of any causal LM
    text = model.config.get_text_config(decoder=True)
    return Head(project.weight, project.bias, getattr(text, "final_logit_softcapping", None))
