"""Settings of the verifier pool."""

from typing import Annotated, Literal

from msgspec import Meta, Struct


class VerifyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`workers` killable processes, each deciding one response at a time."""

    check: str = "math"  # "math", "code", or a function (response, answer) -> bool, as "package.module:function"
    workers: Annotated[int, Meta(ge=1)] = 1
    timeout_s: Annotated[float, Meta(gt=0)] = 5.0  # from when a worker picks the response up
    memory_gib: Annotated[float, Meta(gt=0)] = 2.0  # address space of one worker, or of all processes of a program
    sandbox: Literal["namespaces", "none"] = "namespaces"  # of `code`; none: a program may do what this user may
