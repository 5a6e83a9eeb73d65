"""Threads for an optimizer on the host. Ray gives an actor one, whatever its node has."""

import os
import socket
from pathlib import Path
from typing import Any

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU, of so many


def cores(quota: Path = QUOTA) -> int:
    """Count the cores that this process may use, in part of a machine or of a container."""
    may = len(os.sched_getaffinity(0))
    try:
        time, of = quota.read_text().split()
        return max(1, min(may, int(time) // int(of)))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return may


def optimizer_threads(store: Any, rank: int, ranks: int) -> int:
    """Divide the cores of this rank's node by the ranks that are on it, as they tell each other in
    the `store` where all meet."""
    store.set(f"node of rank {rank}", socket.gethostname())
    names = [store.get(f"node of rank {other}").decode() for other in range(ranks)]
    return max(1, cores() // names.count(socket.gethostname()))
