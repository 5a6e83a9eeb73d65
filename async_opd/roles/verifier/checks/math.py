r"""Mathematical equality of a response's final answer with the reference, by math-verify.

math-verify's own timeouts are off: they are signals, which a long operation in C never sees, and
one that does fire is scored as wrong. The pool kills the process instead.
"""

import logging
import re
from collections.abc import Callable
from functools import partial

from math_verify import parse, verify

from async_opd.core.errors import DataError
from async_opd.roles.verifier.config import VerifyConfig

# Its annotation knows no None, which is no timeout.
_parse = partial(parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
NUMERAL = re.compile(r"[+-]?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure

# Else it warns once a process that timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check, which has no settings."""
    return check


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether the last boxed answer of `response`, or without a box what math-verify
    extracts, equals `answer`; and that answer as `\boxed{…}`, "" where there is none.

    What does not parse is wrong. Raises DataError if the reference does not parse.
    """
    boxed, wanted = last_boxed(response), last_boxed(answer)
    if wanted is None:
        wanted = answer.strip()
    if wanted and boxed == wanted:
        return True, _boxed(wanted)
    parsed = _reference(answer)
    target = _parse(response if boxed is None else _boxed(boxed))
    return (
        verify(parsed, target, timeout_seconds=None, raise_on_error=True),
        _boxed(boxed if boxed is not None else target[-1] if target else ""),
    )


def reference(answer: str) -> None:
    """Raise DataError for a reference that does not parse. A numeral is not parsed: it takes ten
    milliseconds, and there are thousands."""
    if not NUMERAL.fullmatch(answer):
        _reference(answer)


def _reference(answer: str) -> list:
    boxed = last_boxed(answer)
    parsed = _parse(_boxed(answer.strip() if boxed is None else boxed))
    if not parsed:
        raise DataError(f"reference answer {answer!r} does not parse")
    return parsed


def last_boxed(text: str) -> str | None:
    r"""Read what the last `\boxed{…}` holds: "" if it is never closed, None if there is none."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return ""


def _boxed(text: str) -> str:
    """Box `text`, with or without `$`: math-verify makes an expression and its text of that, or
    nothing."""
    return text and f"\\boxed{{{text}}}"
