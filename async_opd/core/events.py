"""What happens to members of a run, emitted to whoever shows it."""

from collections.abc import Callable

EventSink = Callable[[str, str, str], None]  # what happened, to whom, why
