import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.cli.main import COMMANDS, main, parsed
from async_opd.config.load import load
from async_opd.core.errors import ConfigError, TimedOut
from async_opd.evaluation.result import Figure, Result, Settings
from async_opd.telemetry.metrics import ROLES, STATES

SUMMARY = dict(
    accuracy_before=0.25,
    accuracy_after=0.5,
    teacher_accuracy=None,
    eval_problems=8,
    steps=3,
    max_lag_seen=2,
    trained_tokens_per_s=1234.5,
    scored_dropped=1,
    wall_s=9.6,
) | {f"{role}_{state}": 0.2 for role in ROLES for state in STATES}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Makes every command that runs something end with `result`: what it returns, or raises."""
    monkeypatch.chdir(tmp_path)

    def end_with(result) -> None:
        async def run(config, checkpoint=None):
            if isinstance(result, BaseException):
                raise result
            return result

        monkeypatch.setitem(sys.modules, "async_opd.launch.run", SimpleNamespace(run=run))

    return end_with


def helped(capsys, *command: str) -> tuple[str, str]:
    """The usage and the rest of what `--help` prints."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*command, "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    return usage, rest


def test_help_lists_every_command(capsys):
    usage, rest = helped(capsys)
    assert usage.startswith("usage: async-opd ")
    assert re.findall(r"^    (\w+)", rest, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_every_option_of_its_usage(command, capsys):
    usage, rest = helped(capsys, command)
    assert usage.startswith(f"usage: async-opd {command} ")
    explained = re.findall(
        r"^  (?:-\w[ \w.]*, )?(--[a-z-]+)", rest.partition("\noptions:\n")[2], re.MULTILINE
    )
    assert "--help" in explained
    assert set(re.findall(r"--[a-z-]+", usage)) <= set(explained)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_commands(command):
    # a line that goes on
    text = import_module(f"async_opd.cli.{command}").__doc__.replace("\n        ", " ")
    examples = re.findall(r"^ +async-opd (.*?)(?: {2,}.*)?$", text, re.MULTILINE)
    assert examples and all(parsed(shlex.split(example, comments=True)).run for example in examples)


def test_the_module_is_the_command():
    completed = subprocess.run(
        [sys.executable, "-m", "async_opd", "--help"], capture_output=True, text=True, check=True
    )
    assert completed.stdout.startswith("usage: async-opd ")


def test_help_loads_nothing_but_the_command_line():
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from"
        " async_opd.__main__ import main; main()"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    loaded = set(completed.stdout.split("\n")[-2].split())
    assert {name for name in loaded if name.startswith("async_opd")} == {
        "async_opd",
        "async_opd.__main__",
        "async_opd.cli",
        "async_opd.cli.main",
        "async_opd.cli.options",
        "async_opd.core",
        "async_opd.tools",
        "async_opd.tools.cluster_files",  # the names of its kinds
        *(f"async_opd.cli.{command}" for command in COMMANDS),
        "async_opd.core.errors",
        "async_opd.cli.streams",
        "async_opd.core.files",  # what a ~ stands for
        "async_opd.core.process_wide",  # how a signal ends it
        "async_opd.core.reading",
        "async_opd.launch",
        "async_opd.launch.signals",
    }
    assert {"torch", "ray", "msgspec", "numpy"} & loaded == set()


def test_a_config_that_is_not_there_exits_with_two(capsys):
    assert main(["train", "no/such.toml"]) == 2
    assert capsys.readouterr().err == "async-opd: ConfigError: config no/such.toml: no such file\n"


@pytest.mark.parametrize(("kind", "status"), [(ConfigError, 2), (TimedOut, 1)])
def test_a_named_error_is_one_line_with_its_notes_and_its_status(kind, status, runs, capsys):
    error = kind("teacher 0, score: no answer\nafter 120 s")
    error.add_note("at version 7")
    runs(error)
    assert main(["demo"]) == status
    message = (
        f"async-opd: {kind.__name__}: teacher 0, score: no answer after 120 s (at version 7)\n"
    )
    assert capsys.readouterr() == ("", message)


def test_a_bug_keeps_its_trace(runs):
    runs(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["demo"])


def test_an_interrupt_exits_with_130(runs, capsys):
    runs(KeyboardInterrupt())
    assert main(["demo"]) == 130
    kept = "what was trained is in the newest checkpoint, unless it says otherwise above"
    assert capsys.readouterr().err == f"async-opd: interrupted; {kept}\n"


async def _interrupted(*_):
    error = asyncio.CancelledError()
    error.add_note("not saved: the disk is full")
    # as a first Ctrl-C does: asyncio makes a KeyboardInterrupt of what the run then ends with
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.sleep(10)
    except asyncio.CancelledError:
        raise error from None


def test_an_interrupted_run_says_in_the_same_line_what_is_not_saved(monkeypatch, capsys):
    monkeypatch.setattr("async_opd.launch.run.run", _interrupted)
    assert main(["train", str(DEMO)]) == 130
    assert capsys.readouterr().err == "async-opd: interrupted; not saved: the disk is full\n"


def test_an_interrupt_of_what_trains_nothing_promises_no_checkpoint(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("async_opd.tools.audit.books.audit", interrupted)
    assert main(["audit", "runs/demo"]) == 130
    assert capsys.readouterr().err == "async-opd: interrupted\n"


@pytest.mark.parametrize("length", [10, 10**6])  # in one piece at the end, or in many
def test_a_reader_that_has_seen_enough_is_no_error(length):
    code = f"""
import sys
from async_opd.cli import main as cli
from async_opd.cli import audit
audit.run = lambda args: print("x" * {length}) or 0
sys.exit(cli.main(["audit", "runs/demo"]))
"""
    reader, stdout = os.pipe()
    os.close(reader)
    completed = subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(stdout)
    assert (completed.returncode, completed.stderr) == (141, "")


def test_a_run_that_ends_well_says_what_it_reached(runs, capsys):
    runs(SUMMARY)
    assert main(["demo", "run.dir=here"]) == 0
    printed = capsys.readouterr().out
    assert "\nlearner               20.0%    20.0%    20.0%    20.0%    20.0%\n" in printed
    assert (
        "student, before     25.0%\n  student, after      50.0%\n" in printed
        and "teacher     not measured" in printed
    )
    assert (
        "3 steps, 1234 trained tokens/s, largest lag 2, 1 scored and dropped, 10 s;"
        " here/summary.json" in printed
    )


def test_each_of_several_teachers_has_its_accuracy(runs, capsys):
    accuracies = {"teacher_accuracy_math": 0.75, "teacher_accuracy_code": None}
    runs({key: value for key, value in SUMMARY.items() if key != "teacher_accuracy"} | accuracies)
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out
    assert (
        "\n  teacher math        75.0%\n  teacher code   not measured\n  student, before    "
        " 25.0%\n" in printed
    )


@pytest.fixture
def evaluations(monkeypatch, tmp_path):
    """What `eval` asks for; it finds one right response of two to each of four problems."""
    asked = []

    async def run_eval(wanted):
        asked.append(wanted)
        settings = Settings(
            rows="ab12",
            problems=4,
            k=wanted.k,
            max_new_tokens=64,
            chat_template=False,
            template_args={},
            check="math",
            **msgspec.structs.asdict(wanted.sampling),
        )
        return Result(
            model=wanted.student.model,
            path=wanted.data.path,
            settings=settings,
            thinking=None,
            seed=0,
            figures={"avg": Figure(mean=0.5, low=0.25, high=0.75, problems=4)},
            interval="by hand",
            tokens=3.0,
            truncated=0.0,
            unknown=0.0,
            wall_s=1.0,
            environment={},
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "async_opd.evaluation.run", SimpleNamespace(run_eval=run_eval))
    return asked


@pytest.mark.parametrize(
    "words",
    [
        [
            "toy:student",
            "--data",
            "toy:heldout",
            "--k",
            "2",
            "--out",
            "here",
            "rollout.temperature=0.6",
        ],
        [
            "toy:student",
            "rollout.temperature=0.6",
            "--k=2",
            "--out",
            "here",
            "--data",
            "toy:heldout",
        ],
        ["toy:student", "data.path=toy:heldout", "k=2", "run.dir=here", "rollout.temperature=0.6"],
    ],
)
def test_an_evaluation_takes_flags_and_settings_in_any_order_and_says_its_figures(
    words, evaluations, capsys
):
    assert main(["eval", *words]) == 0
    (asked,) = evaluations
    assert (asked.data.path, asked.k, asked.run.dir, asked.sampling.temperature) == (
        "toy:heldout",
        2,
        "here",
        0.6,
    )
    how = (
        "toy:student on 4 problems of toy:heldout: 2 response(s) each, temperature 0.6, top-p 1, at"
        " most 64 tokens"
    )
    last = "  mean length 3.0 tokens, 0.0% truncated, 0.0% unknown; intervals: by hand"
    files = "  here/result.json, here/problems.jsonl"
    assert capsys.readouterr().out.splitlines() == [
        how,
        "  avg@2      50.0%  (25.0% to 75.0%)",
        last,
        files,
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "eval: needs a model, a directory or hub id: async-opd eval MODEL --data PATH"),
        (["--data", "toy:heldout"], "eval: needs a model"),
        (["toy:student"], "eval: needs problems: --data PATH"),
        (
            ["--compare", "a", "b", "toy:student"],
            "eval --compare: takes two results and nothing else",
        ),
        (
            ["--compare", "a", "b"],
            "a: holds no result of `async-opd eval`: result.json: No such file or directory",
        ),
    ],
)
def test_an_evaluation_of_nothing_exits_with_two(words, says, evaluations, capsys):
    assert main(["eval", *words]) == 2
    assert says in capsys.readouterr().err and not evaluations


@pytest.fixture
def audited(tmp_path):
    """A finished run of one step: its directory, and what makes its ledger hold `lines`."""

    def holds(*lines: str) -> str:
        overrides = ["learner.trajectories_per_step=1", "learner.warmup_steps=0", "run.steps=1"]
        (tmp_path / "config.json").write_bytes(msgspec.json.encode(load(DEMO, overrides)))
        (tmp_path / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return str(tmp_path)

    return holds


def test_an_audit_prints_the_books_and_exits_with_zero_when_they_balance(audited, capsys):
    run_dir = audited('["out",1,"7@0"]', '["trained",2,1,["7@0"]]', '["finished",3]')
    assert main(["audit", run_dir]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert (first.split(), last) == (["steps", "1", "of", "1,", "finished"], "the books balance")
    assert main(["audit", run_dir, "--json"]) == 0
    books = json.loads(capsys.readouterr().out)
    assert (books["handed_out"], books["trained"], books["discrepancies"]) == (1, 1, [])


def test_an_audit_names_what_is_wrong_and_exits_with_one(audited, capsys):
    run_dir = audited(
        '["out",1,"7@0"]', '["out",2,"8@0"]', '["trained",3,1,["7@0"]]', '["finished",4]'
    )
    assert main(["audit", run_dir]) == 1
    *_, lost, last = capsys.readouterr().out.splitlines()
    assert (lost, last) == (
        "8@0: lost: handed out, neither trained nor dropped",
        "the books do not balance: 1 found",
    )
    assert main(["audit", run_dir, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["discrepancies"] == [lost]
    assert main(["audit", audited("[")]) == 1
    assert "LedgerError: " in capsys.readouterr().err


def test_an_audit_of_no_run_exits_with_two(tmp_path, capsys):
    assert main(["audit", str(tmp_path / "rum")]) == 2
    message = f"{tmp_path / 'rum'}: no config.json in it: No such file or directory"
    assert capsys.readouterr() == ("", f"async-opd: RunMissing: {message}\n")


def test_train_needs_a_config_or_a_run(capsys):
    assert main(["train"]) == 2
    assert "train: needs a config, a TOML file, or --resume RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generators"], "'generators': write POOL=NUMBER with a number of at least 1"),
        (["generators=0"], "'generators=0': write POOL=NUMBER"),
        (["generators=-1"], "'generators=-1': write POOL=NUMBER"),
        (["generators=2"], "RunMissing: "),
    ],
)
def test_a_size_that_cannot_be_asked_for_exits_with_two(words, says, tmp_path, capsys):
    assert main(["scale", str(tmp_path), *words]) == 2
    assert says in capsys.readouterr().err
