"""Errors of code that is not ours: templates, tokenizers, configs, checks, libraries."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from async_opd.core.errors import AsyncOpdError, DataError, first_line

# Of these the type says nothing that the message does not.
TELLING = (OSError, ValueError)
PANICS = "pyo3_runtime"  # a library in Rust that panics raises no Exception


@contextmanager
def foreign(called: str, error: type[AsyncOpdError] = DataError) -> Generator[None]:
    """Raise whatever foreign code raises inside as one line of type `error`, which begins with
    `called`: the setting, file or row, and what was done with it. Errors of ours pass as they
    are, and so does what ends a process or a task."""
    try:
        yield
    except AsyncOpdError:
        raise
    except BaseException as e:  # by what was called, not by a list of what it may raise
        if not isinstance(e, Exception) and type(e).__module__ != PANICS:
            raise
        kind = "" if isinstance(e, TELLING) else f"{type(e).__name__}: "
        raise error(f"{called}: {kind}{_line(e)}") from e


def _line(error: BaseException) -> str:
    """Shorten an error to one line. The first of pydantic's only counts those behind."""
    if type(error).__module__.startswith("pydantic"):
        listed: list[dict[str, Any]] = cast(Any, error).errors()
        return "; ".join(" ".join(f"{each['msg']}".split()) for each in listed)
    return first_line(error)
