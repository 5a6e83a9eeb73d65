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


def read_reference(answer: str) -> list:
    """Read the reference as the library does. Raises DataError if it does not parse."""
    wanted = last_boxed(answer)
    reference = parsed(boxed(answer.strip() if wanted is None else wanted))
    if not reference:
        raise DataError(f"reference answer {answer[:200]!r} does not parse")
    return reference


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether the last boxed answer of `response`, or without a box what math-verify
    extracts, equals `answer`; and that answer as `\boxed{…}`, "" where there is none.

    What does not parse is wrong. Raises DataError if the reference does not parse.
    """
    content, wanted = last_boxed(response), last_boxed(answer)
    if wanted is None:
        wanted = answer.strip()
    if wanted and content == wanted:
        return True, boxed(wanted)
    reference = read_reference(answer)
    target = parsed(response if content is None else boxed(content))
    return (
        verify(reference, target, timeout_seconds=None, raise_on_error=True),
        boxed(content if content is not None else target[-1] if target else ""),
    )
