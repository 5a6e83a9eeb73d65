"""A run whose teacher is two of vLLM's own servers: one is killed, the run goes on; it is started
again, and serves again; the other is dropped by hand; the books balance, and the key is nowhere."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_opd.cli.main import main
from async_opd.tools.audit.books import audit
from tests.e2e.conftest import events
from tests.faults.harness import Hurt
from tests.faults.served import Served

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
KEY = "sk-of-nobody-Else-71c2"
LIMITS = ["--max-model-len", "128", "--max-num-seqs", "64", "--max-logprobs", "24"]


def holding(text: str, *folders: Path) -> list[str]:
    """Files anywhere below `folders` that hold `text`."""
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return [str(file) for file in files if text.encode() in file.read_bytes()]


@pytest.fixture
def ray_dir() -> Iterator[Path]:
    """Where Ray keeps its sessions: a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="key-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_outlives_a_server_uses_it_again_and_keeps_its_key_to_itself(
    tmp_path, ray_dir, monkeypatch, capsys
):
    monkeypatch.setenv("THEIR_KEY", KEY)
    monkeypatch.setenv("RAY_TMPDIR", str(ray_dir))
    servers = [Served(tmp_path, KEY) for _ in range(2)]
    one, other = servers
    hurt = None
    try:
        for server in servers:
            server.start(*LIMITS)
        for server in servers:
            server.serves()
        hurt = Hurt(
            tmp_path,
            "teacher.backend=server",
            f"teacher.urls={json.dumps([one.url, other.url])}",
            "teacher.key_env=THEIR_KEY",
            "run.sinks=[]",
        )
        hurt.trains(2)
        began = time.time()
        other.kill()
        assert hurt.told("lost", f"teacher {other.url}", began) < 60
        hurt.trains(3)
        other.start(*LIMITS)
        other.serves()
        hurt.told("serves", f"teacher {other.url}", began, 240)
        assert main(["scale", str(hurt.run_dir), f"teacher.urls=-{one.url}"]) == 0
        assert f"teacher: {one.url} {other.url} -> {other.url}" in capsys.readouterr().out
        one.kill()
        hurt.trains(3)
        hurt.job.process.send_signal(signal.SIGINT)
        assert hurt.job.wait(120) == 130, hurt.job.text()
        assert hurt.job.gone_within(60) == []
    finally:
        for server in servers:
            server.kill()
        if hurt and hurt.job.process.poll() is None:
            hurt.job.process.kill()
    books = audit(hurt.run_dir)
    assert books.discrepancies == [] and books.trained > 0
    config = json.loads((hurt.run_dir / "config.json").read_text())
    assert config["teacher"]["urls"] == [other.url]
    assert not any(event["what"] == "starts again" for event in events(hurt.run_dir))
    named = [holding(f"teacher {each.url}", hurt.run_dir) for each in servers]
    shown = {str(hurt.run_dir / name) for name in ("events.jsonl", "spans.jsonl")}
    assert all(shown <= {*files} for files in named)
    assert holding("raylet", ray_dir)
    assert holding(KEY, tmp_path, ray_dir) == []
