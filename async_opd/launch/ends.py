"""The ids that end a response."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.launch.models import load

GENERATION_CONFIG = "generation_config.json"


class Ends(NamedTuple):
    """Ids that end a response of a model, and the first of its files that names any."""

    ids: tuple[int, ...]
    file: str


def ends_of(
    key: str,
    model: str,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerFast,
    words: dict[int, str],
) -> Ends:
    """Read the end ids of a model from its generation config, its config or its tokenizer, the
    first that names any: each must be one of `words`, the tokens by their ids. Raises DataError
    naming file and key."""
    called = f"{key} = {model!r}"
    config = load(key, AutoConfig, model, trust_remote_code)
    named = {
        GENERATION_CONFIG: _generation_config(called, model).get("eos_token_id"),
        "config.json": _first(config.eos_token_id, config.get_text_config().eos_token_id),
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


def _generation_config(called: str, model: str) -> dict[str, Any]:
    """Read it as it stands; empty where there is none."""
    with foreign(f"{called}: {GENERATION_CONFIG}"):
        file = cached_file(model, GENERATION_CONFIG, _raise_exceptions_for_missing_entries=False)
        values = json.loads(Path(file).read_bytes()) if file else {}
    if not isinstance(values, dict):
        raise DataError(f"{called}: {GENERATION_CONFIG}: must hold an object")
    return values


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
