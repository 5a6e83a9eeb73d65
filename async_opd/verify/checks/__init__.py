"""Checks, one module each, found by name: `check(response, answer) -> bool`, True when the response is right.

A check may hang, crash or print: it only ever runs inside a worker process.
"""

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches

from async_opd.errors import ConfigError


def kinds() -> tuple[str, ...]:
    """Names of all checks, sorted. Imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def validate(kind: str, path: str) -> None:
    """Raises ConfigError, naming the setting `path` that holds `kind`, if there is no such check."""
    if kind not in kinds():
        close = get_close_matches(kind, kinds(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{path}: no check is called {kind!r}, there is {', '.join(kinds())}{hint}")


def load(kind: str) -> Callable[[str, str], bool]:
    """The check called `kind`, with its library imported."""
    return importlib.import_module(f"{__name__}.{kind}").check
