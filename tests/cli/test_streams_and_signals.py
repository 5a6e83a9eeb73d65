"""How a command ends that is ended from outside: by a signal, or by standard streams that are
closed, full or of another encoding."""

import os
import signal
import subprocess
import sys
import time

import pytest

from async_opd.cli.main import main

COMMAND = [sys.executable, "-m", "async_opd"]
WAITS = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.{hup})
from async_opd.cli import audit
from async_opd.cli.main import main

def run(args):
    print("ready", flush=True)
    time.sleep({seconds})
    return 0

audit.run = run
sys.exit(main(["audit", "runs/demo"]))
"""


def ended(number: signal.Signals, *, hup: str = "SIG_DFL", seconds: float = 60) -> tuple[int, str]:
    """The status and the complaint of a command that `number` meets at work."""
    with subprocess.Popen(
        [sys.executable, "-c", WAITS.format(hup=hup, seconds=seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, complaint = process.communicate(timeout=30)
    return process.returncode, complaint


@pytest.mark.parametrize(
    ("number", "status", "by"),
    [
        (signal.SIGINT, 130, ""),
        (signal.SIGTERM, 143, " by SIGTERM"),
        (signal.SIGHUP, 129, " by SIGHUP"),
    ],
)
def test_a_signal_ends_any_command_by_one_line_and_its_own_status(number, status, by):
    assert ended(number) == (status, f"async-opd: interrupted{by}\n")


EARLY = """
import os, signal, sys
from async_opd.__main__ import main

class Meets:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Meets())
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["async_opd.cli.main", "async_opd.cli.audit"])
def test_ctrl_c_while_the_command_is_imported_is_one_line(module):
    completed = subprocess.run(
        [sys.executable, "-c", EARLY.format(module=module), "audit", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (130, "async-opd: interrupted\n")


def test_under_nohup_a_terminal_that_closes_ends_nothing():
    assert ended(signal.SIGHUP, hup="SIG_IGN", seconds=0.3) == (0, "")


def test_handlers_are_as_before_when_a_command_is_done(capsys):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert main(["audit", "nowhere"]) == 2
    assert [signal.getsignal(number) for number in numbers] == before


FULL = "async-opd: standard output cannot be written: No space left on device\n"
CLOSED = "async-opd: standard output cannot be written: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("redirected", "words", "status", "complaint"),
    [
        (">/dev/full", "--help", 1, FULL),
        (">/dev/full", "plan --help", 1, FULL),
        (">&-", "plan --help", 1, CLOSED),
        (">&- 2>&-", "audit nowhere", 2, ""),
        ("2>&-", "audit nowhere", 2, ""),
        ("2>/dev/full", "audit nowhere", 2, ""),
        ("<&-", "plan --help >/dev/null", 0, ""),
    ],
)
def test_a_stream_that_is_full_or_closed_is_one_line(redirected, words, status, complaint):
    completed = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -m async_opd {words} {redirected}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (status, complaint)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_has_no_place_for_is_escaped(encoding, tmp_path):
    completed = subprocess.run(
        [*COMMAND, "audit", b"\xff\xe2\x86\x92"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"},
        cwd=tmp_path,
        check=False,
    )
    assert completed.returncode == 2 and completed.stderr.count(b"\n") == 1
    assert b"\\udcff" in completed.stderr and b"no config.json in it" in completed.stderr


def test_a_working_directory_that_is_gone_is_said(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = f"import os, sys; os.chdir({str(folder)!r}); os.rmdir({str(folder)!r}); "
    code += "from async_opd.cli.main import main; sys.exit(main(['audit', 'run']))"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (completed.returncode, completed.stdout, completed.stderr.count("\n")) == (2, "", 1)
    assert "the working directory: No such file or directory" in completed.stderr


def test_a_bug_still_shows_its_trace(monkeypatch):
    from async_opd.cli import audit

    def run(args) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(audit, "run", run)
    with pytest.raises(KeyError, match="a bug"):
        main(["audit", "runs/demo"])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/full/file"), MemoryError()]
)
def test_what_the_machine_refuses_is_one_line_and_status_1(error, monkeypatch, capsys):
    from async_opd.cli import audit

    def run(args) -> int:
        raise error

    monkeypatch.setattr(audit, "run", run)
    assert main(["audit", "runs/demo"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_is_a_line_of_bounded_length_without_control_characters(capsys):
    started = time.monotonic()
    assert main(["train", "a.toml", f"x{'y' * 10**6}\x1b[31m\n=1"]) == 2
    assert main(["demo", f"x{'y' * 10**5}=1"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert len(line) < 2100 and line.isprintable()
    assert time.monotonic() - started < 10
