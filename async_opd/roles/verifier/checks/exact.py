r"""An exact match: the text of the last box, or the whole response after the thoughts, is that of
the reference, letter by letter. White space at the ends is dropped, and other white space counts as
one space; case and punctuation matter."""

from collections.abc import Callable

from async_opd.core.errors import DataError
from async_opd.roles.verifier.answers.response import after_thoughts, boxed, last_boxed
from async_opd.roles.verifier.config import VerifyConfig


def make(config: VerifyConfig) -> Callable[[str, str], tuple[bool, str]]:
    """Return the check, which has no settings."""
    return check


def read_reference(answer: str) -> str:
    """Read the text of a reference. Raises DataError if it is empty."""
    text = answer_text(answer)
    if not text:
        raise DataError(f"reference answer {answer[:200]!r} is empty")
    return text


def check(response: str, answer: str) -> tuple[bool, str]:
    r"""Tell whether `response` says exactly `answer`; and its text as `\boxed{…}`, "" where there
    is none that a box can hold. Raises DataError if the reference is empty."""
    wanted, text = read_reference(answer), answer_text(after_thoughts(response))
    whole = boxed(text)
    return text == wanted, whole if last_boxed(whole) == text else ""


def answer_text(text: str) -> str:
    """Take what the last box holds, or all of `text`, with single spaces."""
    content = last_boxed(text)
    return " ".join((text if content is None else content).split())
