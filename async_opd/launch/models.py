"""What stands beside a model's weights: its tokenizer and its config."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

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
