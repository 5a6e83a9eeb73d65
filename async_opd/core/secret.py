"""A secret on its way to an actor."""

from async_opd.core.message import Struct


class Secret(Struct, frozen=True):
    """A key. What prints it, a trace or a log, prints no more than that there is one."""

    value: str

    def __repr__(self) -> str:
        return "Secret(…)"
