"""What settings name as local is there: models with room for what they are to read, data in a known
format."""

import json
import re
from pathlib import Path

from async_opd import toy
from async_opd.core.errors import ConfigError
from async_opd.core.suggest import beside, wrong
from async_opd.roles.rollout.config import FILE_READERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MODELS = {"toy:student": toy.STUDENT, "toy:teacher": toy.TEACHER}  # that are shipped


def check_data(key: str, path: str, elsewhere: bool = False) -> None:
    """It is there, in a known format, or may be a hub id or lie elsewhere."""
    file = local(key, path, {"toy:train": None, "toy:heldout": None}, elsewhere)
    if file and file.is_file() and file.suffix not in FILE_READERS:
        raise ConfigError(
            f"{key} = {path!r}: must be a folder, or a file ending in {', '.join(FILE_READERS)}"
        )


def local(
    key: str, name: str, shipped: dict[str, Path | None], elsewhere: bool = False
) -> Path | None:
    """Where `name` lies; None for what is made by the run, may be a hub id, or lies elsewhere."""
    if name.startswith("toy:"):
        if name not in shipped:
            raise ConfigError(wrong(key, name, shipped))
        return shipped[name]
    path = Path(name)
    if path.exists():
        return path
    if elsewhere and path.is_absolute():
        return None
    if HUB_ID.fullmatch(name) and not path.parent.is_dir() and path.suffix not in FILE_READERS:
        return None
    hint = beside(name) or "; hub ids are owner/name, and owner/ must not be a folder here"
    raise ConfigError(f"{key} = {name!r}: no such file or folder{hint}")


def check_model(at: str, name: str, folder: Path, sequence: str, longest: int, vllm: bool) -> None:
    """It is a model, with a context for `sequence`; vLLM samples one token behind what it
    scores."""
    setting = f"{at}.model = {name!r}"
    try:
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{setting}: holds no config.json, so it is no model directory") from e
    except ValueError as e:
        raise ConfigError(f"{setting}: its config.json is not JSON: {e}") from e
    most = context(model)
    if most and most < longest + vllm:
        behind = f" less the 1 that {at}.backend = 'vllm' samples" if vllm else ""
        raise ConfigError(f"{sequence}: must be <= {most - vllm}, the context of {setting}{behind}")


def context(model: dict) -> int | None:
    """The most tokens of a sequence by a model's config.json; None where it names none, or where a
    scaled rotary embedding may go further."""
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    return (
        model.get("max_position_embeddings")
        if rope.get("rope_type", "default") == "default"
        else None
    )
