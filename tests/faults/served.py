"""vLLM's own server of the toy teacher, on loopback, to be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.toy import TEACHER

START_S = 300  # on a machine with much else to do


class Served:
    """A server at one port, which asks for `key`, in float32."""

    def __init__(self, folder: Path, key: str):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.folder = folder
        self._key = key
        self._process: subprocess.Popen | None = None

    def start(self, *args: str) -> None:
        """Begin, with those of its options besides; `serves` waits."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", os.environ.copy())
            cpu_engine(1, enforce_eager=True)
            env = os.environ | {"VLLM_API_KEY": self._key, "VLLM_NO_USAGE_STATS": "1"}
        words = f"--host 127.0.0.1 --port {self._port} --dtype float32 --enforce-eager"
        with (self.folder / f"{self._port}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                    *("--model", str(TEACHER), *words.split(), *args),
                ],
                env=env,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def serves(self) -> None:
        """Wait until it does."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError((self.folder / f"{self._port}.log").read_text()[-3000:])

    def kill(self) -> None:
        """End it and its engine, in the middle of whatever they do. May be called again."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
