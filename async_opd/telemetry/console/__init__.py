"""The console of a run: one screen on a terminal, plain lines anywhere else."""

import os
import sys

from async_opd.telemetry.console.lines import Lines
from async_opd.telemetry.metrics import Sink


def console(steps: int) -> Sink:
    """Make the console for a run of `steps`; it takes rows of steps and events."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return Lines(steps)
    from async_opd.telemetry.console.screen import Screen

    return Screen(steps)
