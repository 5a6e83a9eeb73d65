r"""Equality of a response's final answer with the reference as the library math-verify has it, for
comparison with figures of papers. A calculation left as it stands, and so a problem copied into the
box, is right here.

math-verify's own timeouts are off: they are signals, which a long operation in C never sees, and
one that does fire is scored as wrong. The pool kills the process instead.
"""

import logging
from collections.abc import Callable
from functools import partial

from math_verify import parse, verify

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.response import boxed, last_boxed
from async_opd.roles.verifier.config import VerifyConfig

# Its annotation knows no None, which is no timeout.
parsed = partial(parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

# Else it warns once a process that timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check, which has no settings."""
    return check


def read_reference(answer: str) -> str:
    """Take the text of a reference. Raises DataError if it is empty: all else, the library takes
    for a text at least."""
    content = last_boxed(answer)
    wanted = answer.strip() if content is None else content
    if not wanted.strip("$ \t\n"):
        raise DataError(f"reference answer {answer[:200]!r} does not parse")
    return wanted


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether the last boxed answer of `response`, or without a box what math-verify
    extracts, equals `answer`; and that answer as `\boxed{…}`, "" where there is none.

    What does not parse is wrong. Raises DataError if the reference does not parse.
    """
    content, wanted = last_boxed(response), read_reference(answer)
    if content == wanted:
        return True, boxed(wanted)
    reference = parsed(boxed(wanted))
    if not reference:
        raise DataError(f"reference answer {answer[:200]!r} does not parse")
    target = parsed(response if content is None else boxed(content))
    return (
        verify(reference, target, timeout_seconds=None, raise_on_error=True),
        boxed(content if content is not None else target[-1] if target else ""),
    )
