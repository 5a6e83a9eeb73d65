"""What a dead actor leaves behind, with the raylet's setting of the cluster files."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from async_opd.tools.cluster_files.render import REAPER

pytestmark = pytest.mark.ray
# A worker that hangs in a call of NCCL runs no handler of SIGTERM.
HANGS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
CORE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HANGS!r}])"


class Engine:
    """As vLLM's: a process of its own, which has workers."""

    def __init__(self):
        self._core = subprocess.Popen([sys.executable, "-c", CORE])

    def family(self) -> list[int]:
        """This process, the engine's, and its worker's, once it hangs."""
        while not (workers := children(self._core.pid)) or not ignores_sigterm(workers[0]):
            time.sleep(0.05)
        return [os.getpid(), self._core.pid, *workers]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ignores_sigterm(pid: int) -> bool:
    (ignored,) = re.findall(r"SigIgn:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(ignored, 16) >> signal.SIGTERM - 1 & 1)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_workers_of_an_engine_do_not_outlive_its_actor_and_keep_its_card(monkeypatch):
    monkeypatch.setenv(*REAPER.split("="))
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        ray.init(nodes.address, log_to_driver=False)
        engine = ray.remote(num_cpus=0)(Engine).remote()
        actor, *left = ray.get(engine.family.remote(), timeout=60)
        os.kill(actor, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while any(map(alive, left)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()
        nodes.shutdown()
