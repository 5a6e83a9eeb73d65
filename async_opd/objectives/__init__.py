"""One file per objective, config and maths together. `all_objectives()` scans this folder: a new
file is enough."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from async_opd.objectives.base import Objective


@cache
def all_objectives() -> dict[str, type[Objective]]:
    """Every objective in this folder by its tag, the name it has in TOML. Imports each file, but
    not torch."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return {
        str(cls.__struct_config__.tag): cls
        for cls in _below(Objective)
        if cls.__module__.startswith(__name__)
    }


def _below(cls: type[Objective]) -> list[type[Objective]]:
    """Subclasses at any depth that have a tag of their own, as in TOML."""
    below = [each for child in cls.__subclasses__() for each in (child, *_below(child))]
    return [child for child in below if child.__struct_config__.tag != child.__name__]
