"""What happens to members of a run, told to whoever shows it."""

from collections.abc import Callable

Tell = Callable[[str, str, str], None]  # what happened, to whom, why
