r"""Mathematical equality of a response's final answer with the reference.

The answer is what the last `\boxed{…}` after the thoughts holds, or without a box what "the answer
is" is followed by. Where the reference is a number, so is the answer, and worked out: a calculation
left as it stands is wrong, even where its value is right. `tests/roles/verifier/math_pairs.py`
lists what is right, what is wrong, and the known limits.

What our own reading does not know (integrals, sums, limits, …) in a reference is compared by
math-verify; in an answer to any other reference it is wrong.
"""

from collections.abc import Callable

from math_verify import verify

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.compare import read_wanted, same
from async_opd.roles.verifier.answers.reading import read
from async_opd.roles.verifier.answers.response import (
    after_thoughts,
    boxed,
    boxes,
    reference_text,
    stated,
)
from async_opd.roles.verifier.answers.shapes import Group, Scalar, Shape, Text
from async_opd.roles.verifier.answers.terms import Unreadable, names
from async_opd.roles.verifier.answers.writing import LONGEST, tidy
from async_opd.roles.verifier.checks.math_verify import parsed
from async_opd.roles.verifier.config import VerifyConfig

LAST = 4000  # characters of a response without a box, in which its answer is looked for

WORDS = 3  # of an answer in words, without a box
LETTERS = 4  # different ones, of an expression without a box


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check, which has no settings."""
    return check


def read_reference(answer: str) -> str:
    """Read the text of a reference. Raises DataError for one that no response could match: it is
    empty, its braces do not match, or neither we nor math-verify can read it."""
    wanted = reference_text(answer)
    if not _readings(read_wanted, wanted) and not parsed(boxed(wanted)):
        raise DataError(f"reference answer {answer[:200]!r} does not parse")
    return wanted


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether the final answer of `response` is `answer`; and that answer as `\boxed{…}`, ""
    where there is none.

    What does not parse is wrong. Raises DataError if the reference is not usable.
    """
    wanted = read_reference(answer)
    spoken = after_thoughts(response)
    listed = boxes(spoken)
    if not listed:
        text = final(spoken)
        return bool(text) and right(text, wanted), boxed(text)
    if len(listed) > 1 and all(right(text, wanted) for text in listed):
        return True, boxed(listed[-1])
    text = ", ".join(listed)
    return bool(text) and right(text, wanted), boxed(text)


def final(spoken: str) -> str:
    """Find the answer of a response without a box, "" where there is none."""
    spoken = spoken[-LAST:]
    text = stated(spoken)
    if text is not None and any(map(_is_answer, _readings(read, text))):
        return text
    target = parsed(spoken)
    return str(target[-1]) if target else ""


def _is_answer(shape: Shape) -> bool:
    """Tell whether `shape` is more than a sentence."""
    match shape:
        case Text(words):
            return words.replace(" ", "").isalpha() and len(words.split()) <= WORDS
        case Scalar(term):
            return len(names(term)) <= LETTERS
        case Group(_, members):
            return all(map(_is_answer, members))
    return True


def right(text: str, wanted: str) -> bool:
    """Tell whether the answer `text` is what is `wanted`."""
    if text == wanted or len(text) > LONGEST:
        return text == wanted
    ours = _readings(read_wanted, wanted)
    theirs = _readings(read, text)
    if ours:
        return any(same(one, other) for one in ours for other in theirs)
    # Errors of the library are no answer either.
    return verify(parsed(boxed(wanted)), parsed(boxed(text)), timeout_seconds=None)


def _readings(reader: Callable[[str], list[Shape]], text: str) -> list[Shape]:
    try:
        return reader(tidy(text))
    except Unreadable:
        return []
