"""A role that does nothing but say where it is, so that placing can be tested without models."""

import os
import time
from pathlib import Path

import ray


class Idle:
    def __init__(self, log: str = ""):
        """Takes its time, which it writes to `log`."""
        begun = time.time()
        time.sleep(0.3)
        if log:
            Path(log, f"{os.getpid()}").write_text(f"{begun} {time.time()}")

    def listen(self, host: str) -> str:
        """Nobody comes."""
        return f"tcp://{host}:0"

    async def start(self, *args) -> None:
        """Nothing."""

    def where(self) -> tuple[str, str | None]:
        """The node, and the cards that CUDA would show."""
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")

    def title(self) -> str:
        """This process, as others see it."""
        return Path("/proc/self/cmdline").read_text().split("\0")[0]
