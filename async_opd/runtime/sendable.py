"""What a remote call may be given."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import ray

from async_opd.core.errors import WireError
from async_opd.core.message import Struct
from async_opd.objectives.base import Objective

PLAIN = (bool, int, float, str, bytes, np.ndarray, type(None))


def refuse_unsendable(method: str, args: Sequence[Any]) -> None:
    """Raise WireError unless each of `args` may be given to a remote call: a message, an objective,
    a role's own section of the config, a plain number, text, bytes or array, or a reference."""
    for arg in args:
        if isinstance(arg, (*PLAIN, ray.ObjectRef, Struct, Objective)) or _is_role_section(arg):
            continue
        raise WireError(
            f"{method}: {type(arg).__name__} is given to a remote call; allowed are messages, an"
            " objective, a role's own section, numbers, text, bytes, arrays and references"
        )


def _is_role_section(arg: Any) -> bool:
    place = type(arg).__module__
    ours = place.startswith("async_opd.roles.") and place.endswith(".config")
    return isinstance(arg, msgspec.Struct) and ours
