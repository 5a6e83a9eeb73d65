import time

from async_opd.telemetry.console import console
from async_opd.telemetry.console.lines import Lines
from async_opd.telemetry.metrics import ROLES


def test_a_line_prints_what_the_reader_needs(capsys):
    row = {"step": 1, "accuracy": None, "kl": 0.25, "loss": 0.5, "lag_mean": 1.0, "lag_max": 2.0}
    row |= {"queue_ready": 3, "left_s": 9.0} | {f"{role}_busy": 0.5 for role in ROLES}
    row |= {f"{role}_tokens_per_s": 10.0 for role in ("generators", "teachers", "trained")}
    Lines(steps=5)(row)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["step", "accuracy", "kl", "loss"]
    assert line.split()[:4] == ["1/5", "-", "0.2500", "0.5000"]
    assert len(header) == len(line)


def test_an_event_is_a_line_at_once(capsys):
    lines, now = Lines(steps=5), time.mktime((2026, 1, 2, 13, 14, 15, 0, 0, -1))
    lines({"time": now, "what": "lost", "who": "generator 1", "why": "no sign of life"})
    lines({"time": now, "what": "serves", "who": "generator 1", "why": ""})
    assert (
        capsys.readouterr().out
        == "13:14:15 generator 1: lost: no sign of life\n13:14:15 generator 1: serves\n"
    )


def test_what_is_no_terminal_gets_lines():
    assert type(console(5)) is Lines
