"""What a teacher is shown where that is not the student's own prompt: other template arguments, a
solution."""

import re
from dataclasses import dataclass, field
from typing import Any

from async_opd.core.errors import DataError

PLACES = re.compile(r"\{(prompt|solution)\}")


@dataclass(frozen=True, kw_only=True)
class TeacherView:
    """How one teacher sees a row."""

    # beside the student's, and before them
    template_args: dict[str, Any] = field(default_factory=dict)
    context: str | None = None  # text with {prompt} and {solution}, shown instead of the prompt
    # bound of its rendering in tokens, after its name; None: the student's
    longest: tuple[str, int] | None = None

    @property
    def own(self) -> bool:
        """Whether it differs from the student's."""
        return bool(self.template_args or self.context)

    def shown(self, id: str, content: str | list, solution: Any, column: str | None) -> str | list:
        """`content` (a text, or messages of which the last of the user counts) inside the context,
        with the `solution` that stands in `column`. Raises DataError naming the row `id`."""
        if self.context is None:
            return content
        if not isinstance(solution, str | int | float) or solution == "":
            raise DataError(
                f"row {id}: {column!r} must be a string that is not empty or a number, got"
                f" {solution!r}"
            )
        if isinstance(content, str):
            return self._filled(content, str(solution))
        at = max(
            (at for at, message in enumerate(content) if message["role"] == "user"), default=None
        )
        if at is None or not isinstance(content[at]["content"], str):
            raise DataError(
                f"row {id}: no text of the user's that a teacher's context could take in:"
                f" {content!r}"
            )
        filled = content[at] | {"content": self._filled(content[at]["content"], str(solution))}
        return [*content[:at], filled, *content[at + 1 :]]

    def _filled(self, prompt: str, solution: str) -> str:
        """In one pass: what is filled in may hold braces, and even {solution}, and is left as it
        is."""
        return PLACES.sub(lambda place: prompt if place[1] == "prompt" else solution, self.context)
