"""The ids that end a response."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedTokenizerBase

from async_opd.core.errors import DataError
from async_opd.launch.models import generation_config, load, text_config


class Ends(NamedTuple):
    """Ids that end a response of a model, and the first of its files that names any."""

    ids: tuple[int, ...]
    file: str


def ends_of(
    key: str,
    model: str,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase,
    words: dict[int, str],
) -> Ends:
    """Read the end ids of a model from its generation config, its config or its tokenizer, the
    first that names any: each must be one of `words`, the tokens by their ids. Raises DataError
    naming file and key."""
    called = f"{key} = {model!r}"
    generation = generation_config(key, model)
    config = load(key, AutoConfig, model, trust_remote_code)
    named = {
        "generation_config.json": getattr(generation, "eos_token_id", None),
        "config.json": _first(
            getattr(each, "eos_token_id", None)
            for each in (config, text_config(key, model, trust_remote_code))
        ),
        "tokenizer_config.json": tokenizer.eos_token_id,
    }
    for file, eos in named.items():
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not ids or any(type(id) is not int for id in ids):
            raise DataError(
                f"{called}: {file}: eos_token_id = {json.dumps(eos)}: must be an id or a list"
                " of ids"
            )
        for id in ids:
            if id not in words:
                raise DataError(
                    f"{called}: {file}: eos_token_id = {json.dumps(eos)}: {id} is none of the"
                    f" {len(words)} ids that its tokenizer and its head have"
                )
        return Ends(tuple(dict.fromkeys(ids)), file)
    raise DataError(f"{called}: no eos_token_id in any of {', '.join(named)}")


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
