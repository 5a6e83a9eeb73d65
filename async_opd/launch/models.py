"""What stands beside a model's weights: its tokenizer, its config and the ids that end a
response."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign

FILES_OF_MODELS = {
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model", "tekken.json"),
}


def tokenizer_of(key: str, model: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model that can be loaded too. Where its files are missing
    transformers makes one of next to no words."""
    folder = Path(model)
    for what, names in FILES_OF_MODELS.items():
        if folder.is_dir() and not any(file for name in names for file in folder.glob(name)):
            raise DataError(f"{key} = {model!r}: holds no {what} ({', '.join(names)})")
    load(key, AutoConfig, model, trust_remote_code)
    return load(key, AutoTokenizer, model, trust_remote_code)


def load(
    key: str, kind: type[AutoConfig] | type[AutoTokenizer], model: str, trust_remote_code: bool
) -> Any:
    """Read the config or the tokenizer of a model. Raises DataError."""
    with foreign(f"{key} = {model!r}"):
        return kind.from_pretrained(model, trust_remote_code=trust_remote_code)


def eos_ids(key: str, model: str, trust_remote_code: bool) -> list[int]:
    """Read the ids that end a response of `model`, from its generation config (they hold one id or
    several)."""
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        eos = load(key, AutoConfig, model, trust_remote_code).eos_token_id
    if eos is None:
        raise DataError(f"{key} = {model!r}: no eos_token_id in its generation config or config")
    return [eos] if isinstance(eos, int) else list(eos)
