"""Mistakes in a value or a name, in words: what is allowed, and the nearest spelling."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def wrong(path: str, value: Any, choices: Iterable[object]) -> str:
    """Say that a `value` is none of `choices`."""
    choices = list(choices)
    return f"{path} = {value!r}: must be {either(choices)}{nearest(value, choices)}"


def nearest(value: Any, choices: Iterable[object]) -> str:
    """Suggest the one of `choices` that is spelt almost as `value` is; nothing where none is."""
    return did_you_mean(get_close_matches(str(value), map(str, choices), n=1, cutoff=0.5))


def beside(path: str | Path) -> str:
    """Suggest what in the folder of `path`, which is not there, is called almost so; nothing where
    none is."""
    folder, name = Path(path).parent, Path(path).name
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(
        [str(folder / near) for near in get_close_matches(name, names, n=1, cutoff=0.75)]
    )


def either(values: Iterable[object]) -> str:
    """Join the values in words, the last after "or"."""
    *most, last = map(repr, values)
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(names: list[str]) -> str:
    """Suggest these names; nothing where there are none."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""
