"""The first hour on a card is not for typos: what CPUs can of the checks runs here at a tiny size,
and the table is made of what came of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from async_opd.config.load import load
from benchmarks import gpu
from tests.e2e.conftest import SMALL
from tests.gpu import process, runs
from tests.gpu.checks import CHECKS, Check
from tests.gpu.place import Place, Unfit
from tests.gpu.process import Outcome

BY_NAME = {check.name: check for check in CHECKS}
TORCH_ALONE = [check.name for check in CHECKS if not check.packages and "peer" not in check.name]


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_what_needs_torch_alone_runs_and_records_figures(name, tmp_path):
    recorded = {}
    BY_NAME[name].run(
        Place("cpu", True, tmp_path), lambda what, **figures: recorded.update({what: figures})
    )
    assert recorded
    assert all(figures for figures in recorded.values())


def test_nothing_else_need_be_installed_for_them():
    absent = ["vllm", "ray", "deepspeed", "pytest", "psutil", "aiohttp", "datasets", "math_verify"]
    modules = ["benchmarks.gpu", "tests.gpu.peers"]
    modules += {f"tests.gpu.{BY_NAME[name].function.split(':')[0]}" for name in TORCH_ALONE}
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=process.FOLDER.parents[1])


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", ["2 ranks, ZeRO 3", "packed transfer", "gloo, lost peer", "update in flight, gloo"]
)
def test_one_in_a_process_of_its_own_passes(name, tmp_path):
    outcome = process.run(BY_NAME[name], tmp_path, rehearsal=True, limit_s=240)
    assert outcome.status == "pass", (outcome.reason, outcome.rows)
    assert outcome.rows


def test_what_a_machine_lacks_is_named():
    pair = Check("pair", "transfer:packed", cards=2, rehearsed=False)
    assert pair.lacking(1, rehearsal=False) == "needs 2 cards, 1 here"
    assert pair.lacking(2, rehearsal=False) == ""
    assert pair.lacking(0, rehearsal=True) == "has nothing to rehearse on CPUs"
    strange = Check("strange", "transfer:packed", packages=("torch", "no_such_package"))
    assert strange.lacking(0, rehearsal=False) == "needs 1 card, 0 here"
    assert strange.lacking(1, rehearsal=False) == "needs no_such_package: not installed"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_each_check_names_a_function_of_a_file_that_is_there(check):
    module, name = check.function.split(":")
    source = (process.FOLDER / f"{module}.py").read_text()
    assert re.search(rf"^def {name}\(\s*place: Place, record: Record", source, re.MULTILINE)
    assert len(BY_NAME) == len(CHECKS)


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if "overrides" in c.options], ids=lambda c: c.name
)
def test_the_settings_of_a_run_on_cards_are_settings(check):
    overrides = runs.layout(Place("cuda", False, Path()), check.options["overrides"])
    config = load("configs/demo.toml", [f"run.steps={runs.STEPS}", *SMALL, *overrides])
    assert config.run.share_gpu == (check.cards == 1)


def test_one_that_takes_too_long_is_ended_and_fails_by_its_limit(tmp_path):
    outcome = process.run(BY_NAME["head"], tmp_path, rehearsal=True, limit_s=0.2)
    assert (outcome.status, outcome.rows) == ("fail", [])
    assert outcome.reason.startswith("more than 0.2 s, see ")


def test_one_that_fails_keeps_the_figures_that_it_had(tmp_path, monkeypatch):
    def fails(place, record, error):
        record("first", gib=1.5, rows=3)
        raise error

    def tried(error):
        results = tmp_path / type(error).__name__
        monkeypatch.setattr(Check, "run", lambda self, *args: fails(*args, error))
        process.attempt(BY_NAME["head"], results, Place("cpu", True, tmp_path))
        return process.outcome("head", results, "it ended")

    rows = [("first", {"gib": 1.5, "rows": 3})]
    assert tried(AssertionError("the log\noff by 2")) == Outcome(
        "head", "fail", "AssertionError: off by 2", rows
    )
    assert tried(Unfit("needs more")) == Outcome("head", "skip", "needs more", rows)


OUTCOMES = [
    Outcome("head", "pass", rows=[("1024 rows", {"ms": 12.345, "launches": 24936})]),
    Outcome("pair", "fail", "off | by 2", [("a|b", {"ms": 4567.8})]),
    Outcome("run", "skip", "needs 2 cards, 1 here"),
]


def test_the_table_has_a_row_for_every_figure_and_every_end():
    text = gpu.table({"cards": ["a", "b"], "driver": []}, OUTCOMES, False)
    assert text.splitlines() == [
        "- cards: a; b",
        "",
        "| check | of | figures | result |",
        "|---|---|---|---|",
        "| head | 1024 rows | ms 12.3, launches 24,936 | |",
        "| head | | | pass |",
        "| pair | a\\|b | ms 4,568 | |",
        "| pair | | | **fail**: off \\| by 2 |",
        "| run | | | skip: needs 2 cards, 1 here |",
    ]


def test_nobody_takes_a_rehearsal_for_figures():
    assert "CPU rehearsal" in gpu.table({}, OUTCOMES, True).splitlines()[0]


def test_what_came_of_some_is_kept_and_the_exit_status_says_whether_one_failed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "run", lambda check, *_, **__: OUTCOMES[check.name == "head"])
    for name, status in (("head", True), ("attention", False)):
        monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", name])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        assert ended.value.code == status
        table = (tmp_path / "table.md").read_text()
        assert table in capsys.readouterr().out
        kept = json.loads((tmp_path / "results.json").read_text())
        assert kept["rehearsal"]
        assert [check["status"] for check in kept["checks"]] == ["fail" if status else "pass"]


@pytest.mark.parametrize(
    ("args", "message"),
    [((), "sees no card; --tiny rehearses on CPUs"), (("heads",), "no check 'heads'; there are")],
)
def test_what_cannot_be_run_is_one_line(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", *args])
    monkeypatch.setattr(gpu, "cards", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
