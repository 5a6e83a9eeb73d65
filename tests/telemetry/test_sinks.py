import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import ConfigError

ROWS = [
    {"step": 1, "kl": 0.5, "accuracy": None, "lag_max": 0.0},
    {"step": 2, "kl": 0.25, "accuracy": 0.75},
]
RUN = """
import sys
from pathlib import Path
from async_opd.launch import run
from async_opd.telemetry import metrics
from async_opd.config.load import load
from tests.telemetry.test_sinks import DEMO, ROWS
metrics.CLOSE_S = 60
config = load(DEMO, sys.argv[2:])
with metrics.observed(run._sinks(config, Path(sys.argv[1]))) as sinks:
    for row in ROWS:
        for sink in sinks:
            sink(row)
print(*(f"{sink.name} {sink.lost}" for sink in sinks), sep=", ")
print([name for name in ("torch", "tensorflow") if name in sys.modules])
"""


def fed(run_dir, sinks: str, **environment: str) -> list[str]:
    """What a process that feeds ROWS to `sinks` prints; nothing that it started outlives it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    run_dir.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(run_dir), f"run.sinks={sinks}"],
        env=clean | {"HOME": str(run_dir)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    assert ended.stderr == ""
    deadline = time.monotonic() + 30
    while left := [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if home(process) == str(run_dir)
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    return ended.stdout.splitlines()


def home(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ().get("HOME")


def test_rows_are_in_tensorboards_files_and_the_driver_does_without_torch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert fed(tmp_path / "run", '["tensorboard"]') == ["jsonl 0, tensorboard 0", "[]"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    values = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert values == {
        "step": [(1, 1), (2, 2)],
        "kl": [(1, 0.5), (2, 0.25)],
        "accuracy": [(2, 0.75)],
        "lag_max": [(1, 0)],
    }
    assert [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == ROWS


def wandbs_own(path) -> list:
    """The records of a .wandb file: LevelDB's log, of blocks of 32 KiB and pieces behind 7 bytes of
    header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset = path.read_bytes(), 7  # a header of wandb's own
    parts, records = b"", []
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        if left < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_without_a_key_wandb_keeps_rows_and_config_in_the_run_directory_and_asks_nobody(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert fed(tmp_path / "run", '["wandb"]', WANDB_BASE_URL=base) == ["jsonl 0, wandb 0", "[]"]
        with pytest.raises(BlockingIOError):  # nobody came
            server.accept()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = wandbs_own(file)
    (started,) = (record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert (started.project, started.display_name) == ("async-opd", "run")
    assert config["run"]["sinks"] == ["wandb"]
    rows = [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
    assert [{key: row[key] for key in row if not key.startswith("_")} for row in rows] == ROWS


@pytest.mark.parametrize(
    ("sinks", "says"),
    [
        ("wandb", "run.sinks = 'wandb': must be a list of 'prometheus', 'tensorboard' or 'wandb'"),
        (
            '["wandb", "mlflow"]',
            r"run.sinks = \['wandb', 'mlflow'\]: must be a list of 'prometheus', 'tensorboard' or",
        ),
    ],
)
def test_an_unknown_sink_is_refused(sinks, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        load(DEMO, [f"run.sinks={sinks}"])


@pytest.mark.ray
def test_rays_node_exports_the_last_row_to_prometheus(tmp_path):
    import ray

    from async_opd.runtime.nodes import start_ray, taken_over
    from async_opd.runtime.prometheus import gauge
    from async_opd.telemetry.sinks import Prometheus

    start_ray()
    try:
        sink = Prometheus(load(DEMO), tmp_path / "mine", gauge)
        for row in ROWS:
            sink(row)
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        gauges = exported(address)
    finally:
        taken_over().close()
    assert gauges == {"step": 2.0, "kl": 0.25, "accuracy": 0.75, "lag_max": 0.0}


def exported(address: str) -> dict[str, float]:
    """Our gauges by key, once the agent has them: Ray reports each ten seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            text = answer.read().decode()
            gauges = re.findall(
                r'^ray_async_opd_(\w+)\{.*run="mine".*\} (\S+)$', text, re.MULTILINE
            )
            if len(gauges) >= 4:
                return {key: float(value) for key, value in gauges}
        time.sleep(0.5)
    raise AssertionError("nothing of ours is exported")
