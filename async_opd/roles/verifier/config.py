"""Settings of the verifier pool."""

from typing import Annotated, Literal

from msgspec import Meta, Struct


class VerifyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`workers` killable processes, each deciding one response at a time."""

    # "math", "math_verify", "numeric", "choice", "exact", "code", or a function (response, answer)
    # -> True, False, or a reward from 0 to 1, as "package.module:function"
    check: str = "math"
    # Of `numeric`: how far from the reference an answer may be, as a share of it; none: 1e-6.
    tolerance: Annotated[float, Meta(ge=0, lt=1)] | None = None
    # Of a function of yours: its text has the special tokens, such as the end's.
    special_tokens: bool = False
    workers: Annotated[int, Meta(ge=1)] = 1
    timeout_s: Annotated[float, Meta(gt=0)] = 5.0  # from when a worker picks the response up
    # Address space of one worker, or of all processes of a program.
    memory_gib: Annotated[float, Meta(gt=0)] = 2.0
    # Of `code`; none: a program may do what this user may.
    sandbox: Literal["namespaces", "none"] = "namespaces"
    # Variables of the driver's environment that workers have besides PATH, HOME, LANG, TMPDIR,
    # LD_LIBRARY_PATH and PYTHONPATH; nothing where one is not set.
    env: tuple[Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]*$")], ...] = ()
