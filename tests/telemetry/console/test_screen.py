import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from async_opd.core.printing import say
from async_opd.telemetry.console import console
from async_opd.telemetry.console.screen import picture, rendered
from async_opd.telemetry.metrics import ROLES, STATES
from tests.telemetry.console.terminal import shown

SHARES = [
    (0.5, 0.1, 0.2, 0.1, 0.1),
    (0.3, 0.7, 0, 0, 0),
    (0.05, 0.95, 0, 0, 0),
    (0.6, 0.2, 0.1, 0.1, 0),
]
ROW = dict(
    step=75,
    elapsed_s=70.0,
    left_s=3672.0,
    accuracy=0.719,
    kl=0.0312,
    loss=0.0298,
    lr=5e-4,
    lag_mean=2.1,
    lag_max=3.0,
    generators_tokens_per_s=3412.0,
    teachers_tokens_per_s=3398.0,
    trained_tokens_per_s=13399.0,
    queue_ready=5,
    queue_outstanding=24,
    queue_slots=30,
    dropped=7,
    tokens_lag_0=10.0,
    tokens_lag_1=300.0,
    tokens_lag_2=900.0,
    tokens_lag_3=500.0,
    tokens_lag_4=0.0,
) | {
    f"{role}_{state}": x
    for role, shares in zip(ROLES, SHARES, strict=True)
    for state, x in zip(STATES, shares, strict=True)
}
NOON = time.mktime((2026, 1, 2, 12, 0, 0, 0, 0, -1))
LOST = {
    "time": NOON,
    "what": "lost",
    "who": "generator 1",
    "why": "no sign of life for 30 s, so it is given up now",
}
SAVED = {"time": NOON + 65, "what": "saved", "who": "checkpoint", "why": "step 70"}

AT_80 = """\
step 75/150 ━━━━━━━━━━━━━━━━━━━━━╸                      1:01:10 left, 1:12 gone
           tokens/s █ busy  ░ starved  ▒ blocked  ▓ syncing  × down        busy
generators    3,412 ███████████████████████████░░░░░▒▒▒▒▒▒▒▒▒▒▒▓▓▓▓▓▓×××××  50%
teachers      3,398 ████████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  30%
verifier            ███░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░   5%
learner      13,399 ████████████████████████████████░░░░░░░░░░░▒▒▒▒▒▒▓▓▓▓▓  60%
learns     accuracy 71.9%   KL 0.0312   loss 0.0298   lr 5.0e-04
queue      5 ready, 24 of 30 slots taken, 7 dropped
lag        0 ▁▃█▄· 4   mean 2.1   largest 3
events     12:00:00 generator 1: lost: no sign of life for 30 s, so it is give…
           12:01:05 checkpoint: saved: step 70
"""
AT_120 = """\
step 75/150 ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸                                          1:01:10 left, 1:12 gone
           tokens/s █ busy  ░ starved  ▒ blocked  ▓ syncing  × down                                                busy
generators    3,412 ███████████████████████████████████████████████░░░░░░░░░▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▓▓▓▓▓▓▓▓▓▓×××××××××  50%
teachers      3,398 ████████████████████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  30%
verifier            █████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░   5%
learner      13,399 ████████████████████████████████████████████████████████░░░░░░░░░░░░░░░░░░░▒▒▒▒▒▒▒▒▒▒▓▓▓▓▓▓▓▓▓  60%
learns     accuracy 71.9%   KL 0.0312   loss 0.0298   lr 5.0e-04
queue      5 ready, 24 of 30 slots taken, 7 dropped
lag        0 ▁▃█▄· 4   mean 2.1   largest 3
events     12:00:00 generator 1: lost: no sign of life for 30 s, so it is given up now
           12:01:05 checkpoint: saved: step 70
"""  # noqa: E501
AT_40 = """\
step 75/150 ━╸  1:01:10 left, 1:12 gone
           tokens/s █ busy  ░ sta… busy
generators    3,412 ███████░▒▒▒▓▓×  50%
teachers      3,398 ████░░░░░░░░░░  30%
verifier            █░░░░░░░░░░░░░   5%
learner      13,399 ████████░░░▒▒▓  60%
learns     accuracy 71.9%   KL 0.0312 …
queue      5 ready, 24 of 30 slots tak…
lag        0 ▁▃█▄· 4   mean 2.1   larg…
events     12:00:00 generator 1: lost:…
           12:01:05 checkpoint: saved:…
"""


def plain(lines: list[str]) -> str:
    return "".join(re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() + "\n" for line in lines)


class Tty:
    """A pseudo-terminal in the place of stdout, and what has been written to it."""

    def __init__(self, width: int = 80, height: int = 24):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.slave = os.fdopen(slave, "w")
        self.text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while data := os.read(self.master, 65536):
                self.text += data.decode()

    def until(self, text: str) -> str:
        """The lines it shows, once `said` is among them."""
        deadline = time.monotonic() + 30
        while text not in "\n".join(shown(self.text)):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        return "\n".join(shown(self.text))


@pytest.fixture
def tty(monkeypatch):
    """Makes stdout a terminal."""

    def make(**size) -> Tty:
        made = Tty(**size)
        monkeypatch.setattr(sys, "stdout", made.slave)
        return made

    return make


@pytest.fixture(autouse=True)
def colourless(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize(("width", "expected"), [(80, AT_80), (120, AT_120), (40, AT_40)])
def test_the_screen_fits_its_terminal(width, expected):
    # two seconds after the row came
    lines = rendered(picture(ROW, [LOST, SAVED], 150, since_s=2), width - 1)
    assert plain(lines) == expected
    assert max(map(len, expected.splitlines())) < width


def test_colours_are_left_out_where_nobody_wants_them(monkeypatch):
    shown = picture(ROW, [LOST], 150, since_s=0)
    # bold and back
    assert set(re.findall(r"\x1b\[([0-9;]*)m", "".join(rendered(shown, 80)))) == {"1", "0"}
    monkeypatch.delenv("NO_COLOR")
    assert {"32", "33", "35", "36", "31"} <= set(
        re.findall(r"\x1b\[([0-9;]*)m", "".join(rendered(shown, 80)))
    )


def test_a_row_that_lacks_most_keys_is_shown_all_the_same():
    screen = plain(
        rendered(picture({"step": 1, "elapsed_s": 1.0, "left_s": 1.0, "kl": None}, [], 2, 0), 60)
    )
    assert "accuracy -   KL -   loss -   lr -" in screen and "- ready, - of - slots taken" in screen
    assert "lag    mean -   largest -" in screen


def test_what_is_said_and_printed_goes_above_the_screen_and_old_events_with_it(tty):
    terminal = tty()
    out = sys.stdout
    screen = console(150)
    screen(LOST | {"who": "teacher 0"})  # before the first step there is no screen
    terminal.until("12:00:00 teacher 0: lost")
    assert "step" not in terminal.text
    screen(ROW)
    screen.say("")  # draws at once
    terminal.until("events")
    for step in range(5):  # one more than there is room for
        screen(SAVED | {"why": f"step {step}"})
    say("every actor is ready\nand well")
    print("a library's", end=" ")
    print("own line")
    terminal.until("own line")
    screen.close()
    *above, frame = terminal.until("step 4").split("step 75/150")
    assert above == [
        "12:00:00 teacher 0: lost: no sign of life for 30 s, so it is given up now\n"
        "12:01:05 checkpoint: saved: step 0\nevery actor is ready\nand well\na library's own line\n"
    ]
    titles = [line[:10].strip() for line in frame.splitlines()[1:]]
    roles = ["generators", "teachers", "verifier", "learner"]
    assert titles == ["", *roles, "learns", "queue", "lag", "events", "", "", ""]
    # and the cursor is in the line below
    assert frame.endswith("12:01:05 checkpoint: saved: step 4\n")
    assert sys.stdout is out
    say("the end")
    assert terminal.until("the end").endswith("step 4\nthe end\n")


def test_a_terminal_that_is_too_low_shows_what_fits(tty):
    terminal = tty(height=6)
    screen = console(150)
    screen(ROW)
    screen.close()
    lines = terminal.until("verifier").splitlines()
    assert [line[:10].strip() for line in lines] == [
        "step 75/15",
        "",
        "generators",
        "teachers",
        "verifier",
    ]


def test_a_screen_that_shrinks_leaves_nothing_behind(tty):
    terminal = tty()
    screen = console(150)
    screen(ROW)
    screen.say("first\n")
    terminal.until("events")
    screen({key: value for key, value in ROW.items() if not key.startswith("verifier")})
    screen.say("second\n")
    screen.close()
    assert terminal.until("second").count("\n") == 2 + 9 and "verifier" not in "\n".join(
        shown(terminal.text)
    )


STANDS_STILL = """
import sys, time
from async_opd.telemetry import metrics
from async_opd.telemetry.console import console
from async_opd.core.printing import say
from tests.telemetry.console.test_screen import ROW
metrics.CLOSE_S = 0.2
with metrics.observed({"console": lambda: console(150)}) as (shown,):
    shown(ROW)
    out = sys.stdout
    while sys.stdout is out:
        time.sleep(0.01)
    started = time.monotonic()
    for _ in range(500):
        shown(ROW)
        print("x" * 300)  # 150,000 bytes; a terminal takes some thousands
    print(time.monotonic() - started, file=sys.stderr)
    while shown.lost:  # rows that it has not taken yet
        time.sleep(0.01)
say("the end")
print(shown.lost, file=sys.stderr)
"""


def test_a_terminal_that_stands_still_holds_nobody_up_and_the_process_ends():
    _, slave = pty.openpty()  # read by nobody
    ended = subprocess.run(
        [sys.executable, "-c", STANDS_STILL],
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
        timeout=90,
        check=True,
    )
    spent, lost = map(float, ended.stderr.split())
    assert spent < 30 and lost == 0  # whoever waits for the terminal waits for ever


ENDS = """
import os, signal, sys, time, warnings
# A script's background jobs, and their children, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from async_opd.telemetry.console import console
from async_opd.telemetry.metrics import observed
from tests.telemetry.console.test_screen import ROW
with observed({"console": lambda: console(150)}) as (shown,):
    shown(ROW)
    err = sys.stderr
    while sys.stderr is err:
        time.sleep(0.01)
    warnings.warn("a library's warning")
    sys.stdin.readline()
    END
"""


@pytest.mark.parametrize(
    ("end", "status", "last"),
    [
        ("pass", 0, "events     none\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "events     none\n"),
    ],
)
def test_however_a_process_ends_its_terminal_is_fit_for_use(end, status, last):
    terminal = Tty()
    command = [sys.executable, "-c", ENDS.replace("END", end)]
    ending = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=terminal.slave, stderr=terminal.slave
    )
    terminal.until("a library's warning")
    terminal.until("events     none")
    ending.communicate(b"\n")
    shown_text = terminal.until(last.strip())
    assert ending.returncode == status
    assert shown_text.endswith(last)
    assert shown_text.count("step 75/150") == 1 and shown_text.index(
        "a library's warning"
    ) < shown_text.index("step 75/150")
    # no mode of the terminal is ever changed, the cursor's sight among them
    assert "\x1b[?" not in terminal.text
