r"""A choice from A to E: "B", "(b)", `\textbf{(B)}\ 5`, "The answer is B."."""

import re
from collections.abc import Callable

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.response import (
    after_thoughts,
    boxed,
    boxes,
    reference_text,
    stated,
)
from async_opd.roles.verifier.answers.units import unwrap_text
from async_opd.roles.verifier.config import VerifyConfig

# A letter alone, in brackets, or with a full stop and what it stands for.
ALONE = re.compile(
    r"^[\s*]*(?:(?:option|choice|answer)\s*:?\s*)?(?:\(([A-E])\)|([A-E])(?=\s*[*.:)]|[\s*]*$))"
    r"[\s*.:)]*(.*)$",
    re.IGNORECASE | re.DOTALL,
)
# Behind "the answer is", where more may follow.
FIRST = re.compile(
    r"^[\s*$\"'`:]*(?:option|choice)?\s*(?:\(([A-Ea-e])\)|([A-E])(?![A-Za-z'’]))(.*)$"
)
ANOTHER = re.compile(r"^\W*(?:and|or|&)?\s*\(?[A-E]\)?(?:[\s.,:)]|$)")


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check, which has no settings."""
    return check


def read_reference(answer: str) -> str:
    """Read the letter of a reference. Raises DataError if it has none from A to E."""
    letter = _letter(reference_text(answer), ALONE)
    if not letter:
        raise DataError(f"reference answer {answer[:200]!r} is no choice: must be one of A to E")
    return letter


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether `response` chooses what `answer` is; and that letter as `\boxed{…}`, "" where
    it chooses none, or several. Raises DataError if the reference is no letter."""
    wanted, letter = read_reference(answer), chosen(after_thoughts(response))
    return letter == wanted, boxed(letter)


def chosen(spoken: str) -> str:
    """Find the letter in the last box, behind the last "the answer is", or alone on the last
    line."""
    if listed := boxes(spoken):
        letters = {_letter(text, ALONE) for text in listed}
        return letters.pop() if len(letters) == 1 else ""
    if (text := stated(spoken)) is not None:
        return _letter(text, ALONE) or _letter(text, FIRST)
    lines = spoken.strip().splitlines()
    return _letter(lines[-1], ALONE) if lines else ""


def _letter(text: str, pattern: re.Pattern) -> str:
    plain = unwrap_text(re.sub(r"\$|\\[ ,;:!]|\\q?quad|\\left|\\right|~", " ", text))
    plain = re.sub(r"\\(?:mathbf|bf|boldsymbol)\s*\{?([^{}]*)\}?", r"\1", plain)
    match = pattern.match(plain)
    if not match or ANOTHER.match(match[3]):
        return ""
    return (match[1] or match[2]).upper()
