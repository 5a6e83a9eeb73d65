"""Checks of what settings name on this machine: models with room for what they are to read, data in
a known format, a run directory that can be made."""

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_opd import toy
from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_sequence
from async_opd.core.errors import ConfigError
from async_opd.core.files import from_home
from async_opd.core.foreign import foreign
from async_opd.core.reading import content_of, looked_up, refused
from async_opd.core.suggest import beside, wrong
from async_opd.roles.rollout.config import FILE_READERS
from async_opd.roles.teacher.config import JINJA

Engine = dict[str, Any]  # a table of the config
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PATHS = {"dir", "model", "path", "chat_template"}  # settings that are paths, or may be
TEMPLATE = ".jinja"  # how the file of a template ends
MODELS = {"toy:student": toy.STUDENT, "toy:teacher": toy.TEACHER}  # that are shipped


def expand(tree: dict) -> None:
    """Put the user's home in place of the ~ that a path in a tree of settings begins with. Raises
    ConfigError."""
    sections, data = [*tree.items()], tree.get("data")
    several = {
        "teachers": tree.get("teachers"),
        "data.sources": data.get("sources") if isinstance(data, dict) else None,
    }
    for kind, named in several.items():
        if isinstance(named, dict):
            sections += [(f"{kind}.{name}", section) for name, section in named.items()]
    for name, section in sections:
        for key in PATHS & section.keys() if isinstance(section, dict) else ():
            if isinstance(text := section[key], str) and not JINJA.search(text):
                try:
                    section[key] = from_home(text)
                except ConfigError as e:
                    raise ConfigError(f"{name}.{key} = {e}") from None


def check_data(key: str, path: str, elsewhere: bool = False) -> None:
    """Refuse data that is not there in a known format, and can be no hub id and lie nowhere
    else."""
    file = local(key, path, {"toy:train": None, "toy:heldout": None}, elsewhere)
    if file and not file.is_file() and not file.is_dir():
        raise ConfigError(f"{key} = {path!r}: is neither a file nor a folder")
    if file and file.is_file() and file.suffix not in FILE_READERS:
        raise ConfigError(
            f"{key} = {path!r}: must be a folder, or a file ending in {', '.join(FILE_READERS)}"
        )


def local(
    key: str, name: str, shipped: Mapping[str, Path | None], elsewhere: bool = False
) -> Path | None:
    """Find where `name` lies; None for what is made by the run, may be a hub id, or lies
    elsewhere."""
    if name.startswith("toy:"):
        if name not in shipped:
            raise ConfigError(wrong(key, name, shipped))
        return shipped[name]
    path = Path(name)
    if looked_up(f"{key} = {name!r}", path):
        return path
    if elsewhere and path.is_absolute():
        return None
    if HUB_ID.fullmatch(name) and not path.parent.is_dir() and path.suffix not in FILE_READERS:
        return None
    hint = beside(name) or "; hub ids are owner/name, and owner/ must not be a folder here"
    raise ConfigError(f"{key} = {name!r}: no such file or folder{hint}")


def check_model(
    section: str,
    name: str,
    folder: Path,
    sequence: str,
    longest: int,
    engine: Engine | None = None,
    backend: str = "vllm",
) -> None:
    """Refuse what is no model, or has no context for `sequence`, where the table of an `engine` of
    vLLM's may change the model's config; that samples one token behind what it scores."""
    one_more = engine is not None
    setting = f"{section}.model = {name!r}"
    with refused(setting):
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.exists() and not file.is_file() and not file.is_dir():  # read, it may never end
                raise ConfigError(f"{setting}: {file.name} is neither a file nor a folder")
    try:
        content = content_of(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError) as e:
        if base := base_of(setting, folder):
            raise ConfigError(
                f"{setting}: is an adapter of {base!r}, and no whole model; `async-opd export RUN"
                " --merged` writes one"
            ) from e
        raise ConfigError(f"{setting}: holds no config.json, so it is no model directory") from e
    except OSError as e:
        raise ConfigError(f"{setting}: its config.json: {e.strerror}") from e
    with foreign(f"{setting}: its config.json is not JSON", ConfigError):
        model = json.loads(content)
    with foreign(f"{setting}: its config.json is not a model's", ConfigError):
        most = int(context(model | (engine or {}).get("hf_overrides", {})) or 0)
    if most and most < longest + one_more:
        behind = f" less the 1 that {section}.backend = {backend!r} samples" if one_more else ""
        raise ConfigError(
            f"{sequence}: must be <= {most - one_more}, the context of {setting}{behind}"
        )


def base_of(setting: str, folder: Path) -> str | None:
    """Read which model an adapter in `folder` is of; None where there is none. Raises ConfigError
    for one that names no model."""
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").exists():
        return None
    with foreign(f"{setting}: its {file.name}", ConfigError):
        return str(json.loads(content_of(file))["base_model_name_or_path"])


def context(model: dict) -> int | None:
    """Read the most tokens of a sequence from a model's config.json; None where it names none, or
    where a scaled rotary embedding may go further."""
    text = text_settings(model)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    scaled = rope.get("rope_type", "default") != "default"
    return None if scaled else text.get("max_position_embeddings") or text.get("n_positions")


def text_settings(model: dict) -> dict:
    """Look up what a model's config.json says of text, where models of several kinds of input have
    it."""
    deeper = (model.get(name) for name in ("text_config", "decoder", "generator"))
    return next((text for text in deeper if isinstance(text, dict)), model)


def check_files(c: Config, elsewhere: bool) -> None:
    """Refuse local models that are not there or have no context for their longest sequence,
    templates that are not there, and local data that is not there in a known format."""
    for section, model in c.models.items():
        if folder := local(f"{section}.model", model, MODELS, elsewhere):
            scorer = c.scorers.get(section)
            bound, tokens = longest_sequence(section, scorer, c.data, c.rollout)
            backend = scorer.backend if scorer else "transformers"
            engine = scorer.engine if scorer and backend in ("vllm", "server") else None
            sequence = f"{bound} = {tokens}"
            check_model(section, model, folder, sequence, tokens, engine, backend)
    for key, name in c.template_files.items():
        _check_template(f"{key} = {name!r}", name, elsewhere)
    for key, data in c.data.sets.items():
        check_data(key, data.path, elsewhere)
    if c.eval:
        check_data("eval.path", c.eval.path, elsewhere)


def _check_template(setting: str, name: str, elsewhere: bool) -> None:
    path = Path(name)
    if path.suffix != TEMPLATE:
        raise ConfigError(
            f"{setting}: must be true, a file that ends in {TEMPLATE}, or a template in Jinja"
        )
    there = looked_up(setting, path)
    if there and not stat.S_ISREG(there.st_mode):
        raise ConfigError(f"{setting}: is not a file")
    if not there and not (elsewhere and path.is_absolute()):
        raise ConfigError(f"{setting}: no such file{beside(name)}")


def check_run_dir(c: Config, new: bool = True) -> None:
    """Refuse a run directory that cannot be made, and a new one that would move what the run needs
    aside with an earlier one."""
    setting = f"run.dir = {c.run.dir!r}"
    looked_up(setting, c.run.dir)
    place = Path(os.path.realpath(c.run.dir))
    for folder in (place, *place.parents):
        if (there := looked_up(setting, folder)) and not stat.S_ISDIR(there.st_mode):
            raise ConfigError(f"{setting}: {folder} is a file")
    for key, name in {**c.inputs, "the working directory": "."}.items():
        there = new and looked_up(f"{key} = {name!r}", name)
        if there and Path(os.path.realpath(name)).is_relative_to(place):
            raise ConfigError(f"{setting}: holds {key} = {name!r}, and a new run moves it aside")
