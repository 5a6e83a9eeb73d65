"""What asyncio lacks."""

import asyncio
from typing import TypeVar

F = TypeVar("F", bound=asyncio.Future)


def retrieved(future: F) -> F:
    """`future`, whose error asyncio does not report as never retrieved where nobody awaits it any
    more: who did was cancelled, or has raised the error of another, and that is told."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future
