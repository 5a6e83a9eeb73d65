r"""Mathematical equality of a response's final answer with the reference, by math-verify.

math-verify's own timeouts are off: they are signals, which a long operation in C never sees, and
one that does fire is scored as wrong. The pool kills the process instead.
"""

import logging
import re
from collections.abc import Callable

from math_verify import parse, verify

from async_opd.core.errors import DataError
from async_opd.roles.verifier.config import VerifyConfig

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text, not structure

# else it warns once a process that timeouts are off
logging.getLogger("math_verify").setLevel(logging.ERROR)


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    return check


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Whether the last boxed answer of `response`, or without a box what math-verify extracts,
    equals `answer`; and that answer as `\boxed{…}`, "" where there is none.

    What does not parse is wrong. Raises DataError if the reference does not parse.
    """
    given, wanted = last_boxed(response), last_boxed(answer)
    if wanted is None:
        wanted = answer.strip()
    if wanted and given == wanted:
        return True, _boxed(given)
    reference = _parse_boxed(wanted)
    if not reference:
        raise DataError(f"reference answer {answer!r} does not parse")
    target = parse(response, parsing_timeout=None) if given is None else _parse_boxed(given)
    right = verify(reference, target, timeout_seconds=None, raise_on_error=True)
    return right, _boxed(given if given is not None else target[-1] if target else "")


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds: "" if it is never closed, None if there is none."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip()
    return ""


def _parse_boxed(text: str) -> list:
    """What math-verify makes of `text`, with or without `$`: an expression and its text, or
    nothing."""
    return parse(_boxed(text), parsing_timeout=None)


def _boxed(text: str) -> str:
    return text and f"\\boxed{{{text}}}"
