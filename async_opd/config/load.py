"""A config from a TOML file or from a run directory, with overrides, checked as a whole."""

import json
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from async_opd.config.paths import check_files, check_run_dir, expand
from async_opd.config.rules import rules
from async_opd.config.schema import AnyObjective, Config
from async_opd.config.tables import check_tables
from async_opd.config.teacher_rules import refuse_broken
from async_opd.config.validate import refuse_mistakes
from async_opd.core.errors import ConfigError, RunMissing
from async_opd.core.foreign import foreign
from async_opd.core.reading import content_of, read_named
from async_opd.core.run_dir import CONFIG
from async_opd.objectives import Objective


def load(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Config:
    """Read a TOML file, apply `key.path=value` overrides (values in TOML; a bare word is a string),
    check everything.

    `elsewhere`, for a run on other machines, takes an absolute path that is not here for one of
    theirs. Raises ConfigError naming the key's path, the value, what is allowed and the nearest
    spelling.
    """
    return _complete(read_toml(path), overrides, new=True, elsewhere=elsewhere)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read the settings of a TOML file. Raises ConfigError."""
    content = read_named(f"config {path}", path)
    with foreign(f"config {path} is not valid TOML", ConfigError):
        return tomllib.loads(content.decode("utf-8-sig"))  # some editors put a mark before it


def load_run(run_dir: Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Config:
    """Read the config of the run in `run_dir`, to go on with, as `load` does. Raises ConfigError or
    RunMissing."""
    tree = _without_none(read_run(run_dir, dict))
    here = f"run.dir={json.dumps(str(run_dir), ensure_ascii=False)}"
    return _complete(tree, [*overrides, here], new=False, elsewhere=elsewhere)


def read_run(run_dir: Path, kind: type = Config) -> Any:
    """Read the config of the run in `run_dir` as it was, whatever has become of the files it names.
    Raises RunMissing."""
    try:
        content = content_of(run_dir / CONFIG)
    except OSError as e:
        raise RunMissing(f"{run_dir}: no {CONFIG} in it: {e.strerror}") from e
    with foreign(f"{run_dir}: its {CONFIG} is damaged", RunMissing):
        return msgspec.json.decode(content, type=kind)


def _without_none(tree: Any) -> Any:
    """Leave out what is None, as a TOML file does, which has no null."""
    if not isinstance(tree, dict):
        return tree
    return {key: _without_none(value) for key, value in tree.items() if value is not None}


def _complete(tree: dict, overrides: Sequence[str], new: bool, elsewhere: bool) -> Config:
    """Turn a tree and its overrides into a config that has passed every check."""
    for override in overrides:
        apply_override(tree, override)
    if not elsewhere:  # whose homes are others
        expand(tree)
    config = checked(tree, Config)
    refuse_broken(rules(config))
    check_tables(config)
    check_files(config, elsewhere)
    check_run_dir(config, new)
    return config


class ObjectiveAlone(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An objective outside a run."""

    objective: AnyObjective


def load_objective(tag: str, overrides: Sequence[str] = ()) -> Objective:
    """Make the objective of that tag by `key=value` settings of its section, checked as in a
    config."""
    tree = {"tag": tag}
    for override in overrides:
        apply_override(tree, override)
    return checked({"objective": tree}, ObjectiveAlone).objective


def checked(tree: dict, kind: type[Struct]) -> Any:
    """Make a struct of `kind` from a tree of settings. Raises ConfigError."""
    refuse_mistakes(tree, kind)
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as e:
        # an invariant of one section, whose message begins with the key
        place = re.fullmatch(r"(.*) - at `\$\.(.*)`", str(e))
        raise ConfigError(f"{place[2]}.{place[1]}" if place else str(e)) from e


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the setting that `key.path=value` names into the tree. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key.path=value, such as learner.lr=1e-4")
    value: Any = text
    with suppress(ValueError, RecursionError):  # no value of TOML: a bare word
        tables = tomllib.loads(f"value = {text}")
        value = tables["value"] if len(tables) == 1 else text
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
    tree[leaf] = value
