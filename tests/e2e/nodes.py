"""A Ray cluster of several nodes on this machine, as an operator starts it: a raylet each, on
127.0.0.2, 127.0.0.3 …, and a folder each for its files, as on machines of their own: each node
unpacks a job's working directory there, and in a common one the second would take it from under the
first one's processes."""

import re
import shutil
import tempfile
import uuid
from pathlib import Path

from tests.e2e.conftest import Job

ROOT = Path(__file__).parents[2]


class Nodes:
    """A head, which has the job API, and others. Token authentication as Ray has it by itself: on,
    because there is a token in the home directory, here `folder`; who connects says
    RAY_AUTH_MODE=token."""

    def __init__(self, count: int, folder: Path):
        # a socket's path is short
        self._folder, self._sockets = folder, tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        self._env = {
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(uuid.uuid4().hex)
        self.nodes: dict[str, Job] = {}
        self.head = "127.0.0.2"  # of 127.0.0.1 Ray makes the machine's own
        # of Ray's own choice
        head = self._start(self.head, "--head", "--port=0", "--dashboard-port=0")
        address, self.api = (
            _said(head, "--address='(.+)'"),
            _said(head, "RAY_API_SERVER_ADDRESS='(.+)' ray job submit"),
        )
        self._env["RAY_AUTH_MODE"] = "token"
        for last_byte in range(3, count + 2):
            self._start(f"127.0.0.{last_byte}", f"--address={address}")

    def _start(self, address: str, *args: str) -> Job:
        """One more node, up."""
        job = Job(
            "start",
            "--block",
            *args,
            f"--node-ip-address={address}",
            f"--temp-dir={self._sockets}/{address.rpartition('.')[2]}",
            "--min-worker-port=0",  # any: nodes share them
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--num-cpus=1",
            f"--object-store-memory={100 << 20}",
            "--disable-usage-stats",
            folder=self._folder,
            program=("-m", "ray.scripts.scripts"),
            env=self._env,
        )
        self.nodes[address] = job
        # behind its addresses
        job.until(lambda: "To terminate the Ray runtime" in job.text(), timeout_s=150)
        return job

    def kill(self, address: str) -> None:
        """A node dies at once: its raylet, without which its workers end."""
        next(p for p in self.nodes[address].processes() if p.name() == "raylet").kill()

    def stop(self) -> list[str]:
        """End every process of every node; the command lines of those that do not go."""
        for node in self.nodes.values():
            for process in node.processes(everything=True):
                process.kill()
            node.wait(10)
        shutil.rmtree(self._sockets, ignore_errors=True)
        return [line for node in self.nodes.values() for line in node.gone_within(10)]


def _said(head: Job, what: str) -> str:
    """What the head node has printed, without colours, in the place of a pattern's group."""
    return re.search(what, re.sub(r"\x1b\[[\d;]*m", "", head.text()))[1]
