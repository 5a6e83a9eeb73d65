"""Mistakes in a value or a name, in words: what is allowed, and the nearest spelling."""

import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

LONGEST = 300  # characters of a value in a message
USER = re.compile(r"(?<=://)[^/\s'\"@]*@")  # and password, in an address


def wrong(path: str, value: Any, choices: Iterable[object]) -> str:
    """Say that a `value` is none of `choices`."""
    choices = list(choices)
    return f"{path} = {shown(value)}: must be {either(choices)}{nearest(value, choices)}"


def shown(value: Any) -> str:
    """Write a value as it was given, its first LONGEST characters, without a user's password."""
    try:
        text = repr(value)
    except (ValueError, RecursionError) as e:  # of more digits, or deeper, than Python writes
        return f"a value that cannot be shown ({e})"
    text = USER.sub("…@", text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def nearest(value: Any, choices: Iterable[object]) -> str:
    """Suggest the one of `choices` that is spelt almost as `value` is; nothing where none is."""
    word = value[:LONGEST] if isinstance(value, str) else shown(value)
    spelt = {f"{choice}".lower(): f"{choice}" for choice in choices}
    near = get_close_matches(word.lower(), spelt, n=1, cutoff=0.5)
    return did_you_mean([spelt[each] for each in near])


def beside(path: str | Path) -> str:
    """Suggest what in the folder of `path`, which is not there, is called almost so; nothing where
    none is."""
    folder, name = Path(path).parent, Path(path).name
    names: list[str] = []
    with suppress(OSError, ValueError):  # what may not be listed has no name to suggest
        names = [file.name for file in folder.iterdir()]
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
