"""A transformers causal LM run on packed segments: shared by the learner's student and the
teacher's scorer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from async_opd.core.errors import ConfigError, DataError
from async_opd.core.foreign import foreign
from async_opd.maths.logprobs import Head
from async_opd.roles.models.attention import Segments, packed_segments

ATTENTION = "packed_segments"


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
    refuse_unless_packing_is_exact(model, called)
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


Gather = Callable[[list[Tensor]], AbstractContextManager[None]]


@torch.no_grad()
def refuse_unless_packing_is_exact(
    model: PreTrainedModel, called: str, gather: Gather = lambda weights: nullcontext()
) -> None:
    """Compare the second of two packed segments with the model's own logits of it alone, on a few
    tokens. Raises ConfigError as `load`. Within `gather` of weights that are sharded they are
    whole."""
    ids_L = torch.tensor([2, 3, 4, 0, 1], device=model.device)
    with foreign(f"{called}: cannot be run on packed segments", ConfigError):
        hidden_LD = hidden_states(model, ids_L, [3, 2])
        with gather([x for x in head(model)[:2] if x is not None]):
            packed = head(model).logits(hidden_LD[3:])
        alone = model(input_ids=ids_L[None, 3:], use_cache=False, segment_lengths=[2]).logits[0]
    alone = alone.float()
    gap, largest = (packed - alone).abs().max().item(), alone.abs().max().item()
    # Rounding in bfloat16 stays below; a missed bias, mask or scale does not.
    if not gap <= 0.1 * largest:
        raise ConfigError(
            f"{called}: packed logits are off by {gap:.3g} (largest {largest:.3g}); not supported"
        )


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
    segments = Segments.of(segment_lengths)
    return model.base_model(
        input_ids=ids_L[None],
        position_ids=segments.positions(ids_L.device)[None],
        use_cache=False,
        segment_lengths=segments,
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
