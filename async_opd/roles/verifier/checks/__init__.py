"""Checks found by name: modules beside this one, or a function of the user's as
"package.module:function".

Each module has `make(config)`, which returns the check, and `read_reference(answer)`, which raises
DataError for a reference that cannot be used; a user's function may have the latter as an
attribute. It is asked of every row before anything is sampled, in a process of its own as well.

A check is `(response, answer) -> bool`, True when the response is right; a user's may return a
number from 0 to 1 in its place, its reward. One that reads a single answer out of a response
returns a pair of whether it is right and the answer: a text that checks as the response does, or ""
where there is none. A check may hang, crash or print: it only ever runs inside a worker
process. One of a module that has BOUNDED takes `within_s` too, and ends by then itself: it raises
Late where that is not the whole deadline.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any

from async_opd.core.errors import ConfigError, DataError
from async_opd.core.foreign import foreign
from async_opd.core.suggest import shown
from async_opd.roles.verifier.config import VerifyConfig

Decide = Callable[..., float | tuple[bool, str]]
NUMBERS: Any = Real | Decimal  # those of numpy and fractions among them
USERS = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


class Late(Exception):
    """A check that ended itself before it was decided."""


def kinds() -> tuple[str, ...]:
    """List the names of all checks of this package, sorted. Imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def known(check: str) -> bool:
    """Tell whether `check` is one of them, or has the form of a user's."""
    return check in kinds() or USERS.fullmatch(check) is not None


def load(config: VerifyConfig) -> Decide:
    """Load the check that `config` names. Raises ConfigError if it cannot be."""
    if users := USERS.fullmatch(config.check):
        return _load_users(config.check, *users.groups())
    return importlib.import_module(f"{__name__}.{config.check}").make(config)


def bounded(check: str) -> bool:
    """Tell whether `check` ends by its deadline itself, in a worker that goes on."""
    return check in kinds() and hasattr(importlib.import_module(f"{__name__}.{check}"), "BOUNDED")


def reference(config: VerifyConfig) -> Callable[[str], object] | None:
    """Load what the check that `config` names says of a reference, which raises DataError for one
    that it cannot use; None where it says nothing. Raises ConfigError if it cannot be loaded."""
    if users := USERS.fullmatch(config.check):
        return getattr(_users(config.check, *users.groups()), "read_reference", None)
    return importlib.import_module(f"{__name__}.{config.check}").read_reference


def _users(check: str, module: str, function: str) -> Callable[..., Any]:
    with foreign(f"verify.check = {check!r}: cannot be imported", ConfigError):
        decide = getattr(importlib.import_module(module), function)
    if not callable(decide):
        raise ConfigError(
            f"verify.check = {check!r}: is a {type(decide).__name__}, and must be a function"
        )
    return decide


def _load_users(check: str, module: str, function: str) -> Decide:
    decide = _users(check, module, function)

    def decided(response: str, answer: str) -> float:
        reward = decide(response, answer)
        if getattr(reward, "ndim", None) == 0:  # of numpy or torch
            reward = reward.item()
        if not isinstance(reward, NUMBERS) or not 0 <= reward <= 1:  # True is 1; NaN is neither
            raise DataError(
                f"{check} returned {shown(reward)}, and must return True, False or a number from 0"
                " to 1"
            )
        return float(reward)

    return decided
