"""A role built in its actor, or what stands in its place."""

import traceback
from importlib import import_module
from typing import Any

from async_opd.core.errors import ActorLost, AsyncOpdError
from async_opd.core.foreign import foreign
from async_opd.core.process_wide import no_garbage_collection


class Unbuilt:
    """In the place of a role that could not be built: whatever is asked of it raises why."""

    def __init__(self, why: AsyncOpdError):
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise self._why


def take_of_card(memory_share: float) -> None:
    """Let PyTorch take no more than this share of the card's memory; all of it for 0 and 1."""
    if 0 < memory_share < 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(memory_share)


def built(called: str, target: str, *args: Any) -> Any:
    """Build `target`, "module:name", with `args`. An error becomes an `Unbuilt`, with its name and
    one line, an ActorLost where it has no name of ours: Ray would make a trace of it. The trace
    goes into this process's own log."""
    module, name = target.split(":")
    try:
        with no_garbage_collection(), foreign(f"{called} cannot be built", ActorLost):
            return getattr(import_module(module), name)(*args)
    except AsyncOpdError as error:
        traceback.print_exc()
        return Unbuilt(error.with_traceback(None))
