"""An objective from outside the package: one file with a metric of its own is enough for the row,
Prometheus, the table of metrics, the report and `explain`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_opd.core.errors import ConfigError
from async_opd.objectives.opd import Opd

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "configs" / "explain_example.json"
OBJECTIVE = '''
from async_opd.objectives.opd import Opd


class Surprised(Opd, tag="surprised"):
    """OPD that shows where the teacher is surprised."""

    metrics = {"surprised": ("share", "of the trained tokens that the teacher gives below 1 in 20")}

    def token_metrics(self, batch):
        return {"surprised": batch.teacher_logp_N.exp() < 0.05}
'''
FOUND = """
import sys
import async_opd.objectives as package
package.__path__.append(sys.argv[1])
"""
TRAINED = (
    FOUND
    + """
import asyncio
import json
from pathlib import Path

from async_opd.core.wire import StepResult
from async_opd.config.load import load
from async_opd.objectives import all_objectives
from async_opd.telemetry import metric_names
from async_opd.telemetry.metrics import Jsonl, Meter
from async_opd.telemetry.sinks import Prometheus
from tests.driver.test_train_loop import run
from tests.objectives.test_contract import accumulated, packed
from tests.simulated.roles import RecordingLearner

folder = Path(sys.argv[1])
objective = all_objectives()["surprised"]()
settings = ("run.steps=2", "learner.warmup_steps=0", "objective={tag='surprised'}")


class Learner(RecordingLearner):
    async def step(self, groups):
        result = await super().step(groups)
        metrics, *_ = accumulated(objective, packed(objective, range(2 * result.version)))
        return StepResult(version=result.version, metrics=metrics)


def gauge(name, meaning, run):
    return lambda value: print(json.dumps([name, meaning, value]))


async def main():
    prometheus = Prometheus(load("configs/demo.toml", settings), folder, gauge)
    meter = Meter([Jsonl(folder / "metrics.jsonl"), prometheus])
    await run(folder, *settings, learner=Learner(), meter=meter)


asyncio.run(main())
(folder / "config.json").write_text('{"objective": {"tag": "surprised"}}')
print(json.dumps(metric_names.markdown()))
"""
)
COMMAND = FOUND + "from async_opd.cli.main import main\nsys.exit(main(sys.argv[2:]))\n"


def python(program: str, *words: object, status: int = 0) -> subprocess.CompletedProcess:
    """A process that runs `program` with these words, from the root of the repository."""
    command = [sys.executable, "-c", program, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == status, ended.stderr
    return ended


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "surprised.py").write_text(OBJECTIVE)
    return tmp_path


def test_its_metric_is_in_the_row_in_prometheus_in_the_table_and_in_the_report(folder):
    *gauges, page = map(json.loads, python(TRAINED, folder).stdout.splitlines())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    shares = [row["surprised"] for row in rows]
    assert 0 < shares[0] != shares[1] < 1
    meaning = "of the trained tokens that the teacher gives below 1 in 20"
    named = [gauge for gauge in gauges if gauge[0] == "async_opd_surprised"]
    assert named == [["async_opd_surprised", meaning, share] for share in shares]
    section = page.partition("## Made by the learner, for `surprised`")[2]
    assert section.splitlines()[4] == f"| `surprised` | share | {meaning} |"
    python(COMMAND, folder, "report", folder)
    report = (folder / "report.html").read_text()
    assert "What the method shows" in report and re.search(r"\bsurprised\b", report)


def test_explain_says_it_of_each_token(folder):
    words = ("explain", "--objective", "surprised", EXAMPLE, "--json")
    explained = json.loads(python(COMMAND, folder, *words).stdout)["trajectories"]
    given = json.loads(EXAMPLE.read_text())["trajectories"]
    for effect, trajectory in zip(explained, given, strict=True):
        assert effect["surprised"] == [logp < -2.995732 for logp in trajectory["teacher_logp"]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wants", "requirements"),
        ("measures", "token_statistics"),
        ("terms", "token_loss"),
        ("show", "token_metrics"),
        ("shown", "metrics"),
        ("episode", "trajectory_statistics"),
    ],
)
def test_a_hook_by_its_old_name_is_refused_and_its_new_name_said(old, new):
    with pytest.raises(ConfigError, match=rf"^objective Older: {old} is called {new} now$"):
        type(Opd)("Older", (Opd,), {old: lambda self: None}, tag="older")


def test_a_file_with_an_old_hook_costs_a_command_one_line(tmp_path):
    old = OBJECTIVE.replace("def token_metrics", "def show")
    (tmp_path / "surprised.py").write_text(old)
    words = ("explain", "--objective", "opd", EXAMPLE)
    ended = python(COMMAND, tmp_path, *words, status=2)
    line = "async-opd: ConfigError: objective Surprised: show is called token_metrics now\n"
    assert (ended.stdout, ended.stderr) == ("", line)


def test_a_setting_may_have_the_name_of_an_old_hook():
    class Shows(Opd, tag="shows"):
        show: int = 3

    assert Shows().show == 3
