r"""A number near the reference's: |answer - reference| <= `verify.tolerance` * |reference|.

The answer is what the last `\boxed{…}` after the thoughts holds, without a box what "the answer is"
or #### is followed by, or else the last numeral of the response. As in `math` it must be worked
out, and a unit that only one of both names is that of the other; 50% is 50 and 0.5.
"""

import re
from collections.abc import Callable
from functools import partial

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.compare import stated as members
from async_opd.roles.verifier.answers.reading import read
from async_opd.roles.verifier.answers.response import (
    after_thoughts,
    boxed,
    boxes,
    reference_text,
    stated,
)
from async_opd.roles.verifier.answers.shapes import Relation, Scalar, Shape
from async_opd.roles.verifier.answers.terms import (
    Term,
    Unreadable,
    evaluate,
    names,
    precise,
)
from async_opd.roles.verifier.answers.units import PERCENT
from async_opd.roles.verifier.answers.values import worked_out
from async_opd.roles.verifier.answers.writing import tidy
from async_opd.roles.verifier.config import VerifyConfig

TOLERANCE = 1e-6  # where `verify.tolerance` is not set
NUMERAL = re.compile(
    r"(?:(?<![\w)])[-−–])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+|/\d+)?%?|\.\d+)"
)


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check with the tolerance that is set."""
    tolerance = TOLERANCE if config.tolerance is None else config.tolerance
    return partial(check, tolerance=tolerance)


def read_reference(answer: str) -> list[Scalar]:
    """Read the number of a reference. Raises DataError if it has no value."""
    numbers = _numbers(reference_text(answer))
    if not numbers:
        raise DataError(f"reference answer {answer[:200]!r} is no number")
    return numbers


def check(response: str, answer: str, tolerance: float = TOLERANCE) -> tuple[bool, str]:
    r"""Tell whether the number of `response` is within `tolerance` of that of `answer`; and its
    text as `\boxed{…}`, "" where there is none. Raises DataError if the reference is no number."""
    wanted, text = read_reference(answer), final(after_thoughts(response))
    pairs = [(one, other) for one in wanted for other in _numbers(text)]
    return any(_near(one, other, tolerance) for one, other in pairs), boxed(text)


def final(spoken: str) -> str:
    """Find the text of the number in `spoken`, "" where there is none; several boxes beside each
    other, or several numbers that are stated, are none."""
    if listed := boxes(spoken):
        return listed[0] if len(listed) == 1 else ", ".join(listed)
    text = stated(spoken) or ""
    if _numbers(text):
        return text
    if numerals := NUMERAL.findall(text):
        return numerals[0] if len(numerals) == 1 else ""
    numerals = NUMERAL.findall(spoken)
    return numerals[-1] if numerals else ""


def _numbers(text: str) -> list[Scalar]:
    """List the readings of `text` that are numbers."""
    try:
        readings = read(tidy(text))
    except Unreadable:
        return []
    shapes: list[Shape] = []
    for one in readings:
        shapes += members(one) if isinstance(one, Relation) else [one]
    return [one for one in shapes if isinstance(one, Scalar) and _has_value(one.term)]


def _has_value(term: Term) -> bool:
    if names(term):
        return False
    try:
        evaluate(term, {}, 10)
    except Unreadable:
        return False
    return True


def _near(wanted: Scalar, answer: Scalar, tolerance: float) -> bool:
    units = {wanted.unit, answer.unit} - {""}
    if len(units) > 1 or not worked_out(wanted.term, answer.term):
        return False
    one, other = (precise(evaluate(number.term, {}, 10)) for number in (wanted, answer))
    pairs = [(one, other)]
    if units == {PERCENT} and wanted.unit != answer.unit:
        pairs.append((one / 100, other) if wanted.unit else (one, other / 100))
    return any(abs(a - b) <= tolerance * abs(a) for a, b in pairs)
