"""What messages must be for a chat template to render them, and what it must have made of them."""

import json
from collections.abc import Sequence
from typing import Any

from async_opd.core.errors import DataError
from async_opd.core.suggest import wrong

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = 'a text, or a list of parts {"type": "text", "text": ...}'


def shown(value: Any, most: int = 100) -> str:
    """Write `value` as Python does, in at most `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def usable(messages: Sequence[Any], column: str, template: str) -> list[dict[str, Any]]:
    """Check `messages` of `column`, and take them as the template is to see them: without keys
    that are null, which `datasets` gives to all where one has them. Raises DataError."""
    cleaned = [
        _message(each, f"{column!r}, message {i}", template) for i, each in _from_1(messages)
    ]
    if not any(text_of(message["content"]).strip() for message in cleaned):
        raise DataError(f"{column!r} holds messages without any text: {shown(messages)}")
    return cleaned


def text_of(content: str | list[dict[str, Any]]) -> str:
    """Join the parts of a content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def check_rendering(
    text: Any, messages: Sequence[dict[str, Any]], column: str, *, template: str, called: str
) -> None:
    """Raise DataError where a template, which is `called` so, made nothing of `messages`, left one
    out of which it does not know the role, or wrote parts as a list. Takes what it rendered,
    `text`."""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{called} renders {column!r} as {shown(text)}, which is no text")
    for i, message in _from_1(messages):
        content, role = message["content"], message["role"]
        parts = [] if isinstance(content, str) else [part["text"] for part in content]
        if parts and (
            repr(content) in text
            or json.dumps(content) in text
            or not all(part.strip() in text for part in parts)
        ):
            raise DataError(
                f"{column!r}, message {i}: {called} does not render a list of parts: make it one"
                " text"
            )
        if not _names(template, role) and text_of(content).strip() not in text:
            raise DataError(
                f"{column!r}, message {i}: {called} leaves out a message of role {role!r}"
            )


def _message(message: Any, place: str, template: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") is None or "content" not in message:
        raise DataError(f"{place}: must have role and content, got {shown(message)}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not (role in ROLES or _names(template, role)):
        raise DataError(wrong(f"{place}: role", role, ROLES))
    kept = {key: value for key, value in message.items() if value is not None}
    if content is None and kept.get("tool_calls"):
        return kept | {"content": ""}
    if isinstance(content, list) and content:
        return kept | {"content": [_part(part, place) for part in content]}
    if not isinstance(content, str):
        raise DataError(f"{place}: content must be {TEXTS}, got {shown(content)}")
    return kept


def _part(part: Any, place: str) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise DataError(f"{place}: content must be {TEXTS}, got the part {shown(part)}")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{place}: content must be {TEXTS}, got the part {shown(part)}")
    return {key: value for key, value in part.items() if value is not None}


def _names(template: str, role: str) -> bool:
    """Tell whether the source of a template speaks of a role."""
    return f"'{role}'" in template or f'"{role}"' in template


def _from_1(messages: Sequence[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(messages, start=1))
