"""Settings of the verifier pool."""

from typing import Annotated, Literal

from msgspec import Meta, Struct


class VerifyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`workers` killable processes, each deciding one response at a time."""

    # "math", "code", or a function (response, answer) -> bool, as "package.module:function"
    check: str = "math"
    workers: Annotated[int, Meta(ge=1)] = 1
    timeout_s: Annotated[float, Meta(gt=0)] = 5.0  # from when a worker picks the response up
    # Address space of one worker, or of all processes of a program.
    memory_gib: Annotated[float, Meta(gt=0)] = 2.0
    # Of `code`; none: a program may do what this user may.
    sandbox: Literal["namespaces", "none"] = "namespaces"
