"""What a teacher is shown where that is not the student's own prompt: a template of its own or
other arguments of it, a system message, a solution."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from async_opd.core.errors import DataError
from async_opd.roles.rollout.messages import shown, text_of
from async_opd.roles.rollout.template import Template

SYSTEM = ("system", "developer")  # roles of what a conversation may begin with
PLACES = re.compile(r"\{(prompt|solution)\}")


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """How one teacher sees a row."""

    template: Template | None = None  # its own; None: the student's, if any
    head: int | None = None  # rows of its head, with a template of its own
    # Instead of the system message that a row begins with, or before what it begins with.
    system: str | None = None
    # Beside the student's, and before them.
    template_args: dict[str, Any] = field(default_factory=dict)
    context: str | None = None  # text with {prompt} and {solution}, shown instead of the prompt
    # Bound of its rendering in tokens, after its name; None: the student's.
    longest: tuple[str, int] | None = None

    @property
    def differs(self) -> bool:
        """Whether it differs from the student's."""
        return bool(self.template or self.system is not None or self.template_args or self.context)

    def addressed(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put its system message at the head of `messages`."""
        if self.system is None:
            return [*messages]
        begins = bool(messages) and messages[0]["role"] in SYSTEM
        return [{"role": "system", "content": self.system}, *messages[begins:]]

    def shown(self, content: str | list, solution: Any, column: str | None) -> str | list:
        """Put `content` (a text, or messages of which the last of the user counts) inside the
        context, with the `solution` that stands in `column`. Raises DataError."""
        if self.context is None:
            return content
        if not isinstance(solution, str | int | float) or not str(solution).strip():
            raise DataError(
                f"{column!r} must be a string that is not empty or a number, got {solution!r}"
            )
        if isinstance(content, str):
            return _filled(self.context, content, str(solution))
        last = max(
            (i for i, message in enumerate(content) if message["role"] == "user"), default=-1
        )
        if last < 0:
            raise DataError(
                f"no text of the user's that a teacher's context could take in: {shown(content)}"
            )
        text = _filled(self.context, text_of(content[last]["content"]), str(solution))
        return [*content[:last], content[last] | {"content": text}, *content[last + 1 :]]


def _filled(context: str, prompt: str, solution: str) -> str:
    """Fill `context` in one pass: what is filled in may hold braces, and even {solution}, and is
    left as it is."""
    return PLACES.sub(lambda place: prompt if place[1] == "prompt" else solution, context)
