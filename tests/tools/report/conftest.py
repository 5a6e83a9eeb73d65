"""Run directories as training leaves them, and a browser."""

import json
import math
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.connection import Connection

ROLES = ("generators", "teachers", "verifier", "learner")
STATES = ("busy", "starved", "blocked", "syncing", "down")
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def row(step: int, rng: random.Random) -> dict:
    """Make a row as a step of the demo writes it."""
    lags = [rng.random() for _ in range(3)]
    shares = {}
    for role in ROLES:
        parts = [rng.random() for _ in STATES]
        shares |= {
            f"{role}_{state}": part / sum(parts) for state, part in zip(STATES, parts, strict=True)
        }
    return {
        "step": step,
        "elapsed_s": 2.0 * step,
        "left_s": 1.0,
        "tokens": 3000.0,
        "loss": 1 / step,
        "kl": 2 / step,
        "entropy": 1.0 / math.sqrt(step),
        "length_mean": 40 + rng.random(),
        "selected": 1.0,
        "grad_norm": rng.random(),
        "weight_mean": rng.random(),
        "weight_max": 4 * rng.random(),
        "weight_ess": rng.random(),
        "ratio_ess": 1.0,
        **{f"tokens_lag_{lag}": 1000 * share for lag, share in enumerate(lags)},
        **shares,
        "generators_tokens_per_s": 1000 * rng.random(),
        "teachers_tokens_per_s": 900.0,
        "trained_tokens_per_s": 800.0,
        "accuracy": rng.random() if step % 7 else None,
        "queue_ready": step % 5,
        "queue_outstanding": 40,
        "dropped": 0,
    }


def rollout(step: int, tokens: list[str], **more: Any) -> dict[str, Any]:
    """Make a line as the rollout log writes it."""
    count = len(tokens)
    return {
        "step": step,
        "id": f"{step}@0#0",
        "prompt": "1+2=",
        "prompt_cut": 0,
        "tokens": tokens,
        "cut": 0,
        "truncated": False,
        "reward": 1.0,
        "student": [-0.5] * count,
        "behaviour": [-0.5] * count,
        "teacher": [-0.5] * count,
        "advantage": [(-1) ** i * 0.1 * i for i in range(count)],
        "selected": [i % 2 for i in range(count)],
        "weight": [0.5 * i for i in range(count)],
        "ratio": [1.0] * count,
        "version": [step - 1] * count,
    } | more


def write_lines(file: Path, lines: Iterable[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """Make run directories of so many steps."""

    def make(
        name: str = "run",
        steps: int = 30,
        *,
        rollouts: Sequence[dict] = (),
        settings: dict | None = None,
    ) -> Path:
        folder, rng = tmp_path / name, random.Random(name)
        folder.mkdir()
        write_lines(folder / "metrics.jsonl", (row(step, rng) for step in range(1, steps + 1)))
        config = {
            "run": {"dir": str(folder), "steps": steps, "max_lag_steps": 2},
            "objective": {"tag": "opd"},
            "learner": {"lr": 0.001},
            **(settings or {}),
            "data": {"path": f"{folder}/data/train.jsonl"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "environment.json").write_text(
            '{"commit": "abc123", "versions": {"torch": "2.13.0"}}'
        )
        summary = {
            "accuracy_before": 0.25,
            "accuracy_after": 0.75,
            "eval_problems": 64,
            "dropped_stale": 3,
            "trained_tokens_per_s": 812.0,
            "restarts": 0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        write_lines(folder / "samples.jsonl", rollouts)
        (folder / "ledger.jsonl").write_text(
            '["out",1,"7@0"]\n["checkpoint",2,10]\n["checkpoint",3,20]\n'
        )
        lost = {"time": 1.0, "step": 12, "who": "generator 0", "what": "lost", "why": "it died"}
        write_lines(folder / "events.jsonl", [lost])
        return folder

    return make


class Page:
    """A page in a tab by itself, by the DevTools protocol."""

    def __init__(self, socket: Connection):
        self._socket = socket
        self._next = 0
        self._session: dict[str, str] = {}  # of what is sent: none before the tab is there
        self.complaints: list[str] = []  # errors and warnings of the console, exceptions, refusals
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        answer = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": answer["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict:
        self._next += 1
        self._socket.send(
            json.dumps({"id": self._next, "method": method, "params": params, **self._session})
        )
        while (answer := json.loads(self._socket.recv(20))).get("id") != self._next:
            self._heard(answer["method"], answer.get("params", {}))
        assert "error" not in answer, answer
        return answer["result"]

    def _heard(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event in ("Runtime.exceptionThrown", "Log.entryAdded") or (
            event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(str(params))

    def open(self, file: Path, *, width: int = 1280, scheme: str = "light") -> "Page":
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.send("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + 20
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)
        return self

    def js(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[str]:
    """Start a headless Chromium and yield its address."""
    if CHROMIUM is None:
        absent = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        absent("Chromium is not installed: apt-get install chromium")
    folder = tmp_path_factory.mktemp("chromium")
    with subprocess.Popen(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            port, deadline = folder / "DevToolsActivePort", time.monotonic() + 60
            while not (port.exists() and len(port.read_text().split()) == 2):
                assert process.poll() is None and time.monotonic() < deadline, (
                    "Chromium does not start"
                )
                time.sleep(0.05)
            number, path = port.read_text().split()
            yield f"ws://127.0.0.1:{number}{path}"
        finally:
            process.terminate()


@pytest.fixture
def page(chromium) -> Iterator[Page]:
    with connect(chromium, max_size=None) as socket:
        yield Page(socket)
