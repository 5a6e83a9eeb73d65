"""What tests read of other processes, which may end at any moment."""

from contextlib import suppress

import psutil


def command_line(process: psutil.Process) -> list[str]:
    """Read the arguments of `process`; none of one that has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):  # a zombie, too
        return process.cmdline()
    return []
