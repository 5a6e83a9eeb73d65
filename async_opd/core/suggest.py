"""What is wrong with a value or a name, in words: what is allowed, and the nearest spelling."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def wrong(path: str, value: Any, choices: Iterable[Any]) -> str:
    """The message for a `value` that is none of `choices`."""
    choices = list(choices)
    return f"{path} = {value!r}: must be {either(choices)}{nearest(value, choices)}"


def nearest(value: Any, choices: Iterable[Any]) -> str:
    """A suggestion where one of `choices` is spelt almost as `value` is; else nothing."""
    return did_you_mean(get_close_matches(str(value), map(str, choices), n=1, cutoff=0.5))


def beside(path: str | Path) -> str:
    """A suggestion where `path` is not there, but something in its folder is called almost so; else
    nothing."""
    folder, name = Path(path).parent, Path(path).name
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(
        [str(folder / near) for near in get_close_matches(name, names, n=1, cutoff=0.75)]
    )


def either(values: Iterable[Any]) -> str:
    """The values in words, the last after "or"."""
    *most, last = map(repr, values)
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(names: list[str]) -> str:
    """A suggestion of these names; nothing where there are none."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""
