import json
import resource
import threading
import time

import pytest

from async_opd.telemetry import metrics
from async_opd.telemetry.metrics import (
    OBSERVER_BACKLOG,
    ROLES,
    STATES,
    Jsonl,
    Meter,
    observed,
    time_table,
)

STEP = {"tokens": 100.0, "lag_max": 2.0, "lag_mean": 1.0, "loss": 0.5, "kl": 0.25}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_row_holds_the_learners_metrics_and_the_rates():
    rows, clock = [], Clock()
    meter = Meter([rows.append], clock)
    clock.now = 10.0
    meter.start()
    meter.count("generators", 300)
    clock.now = 12.0
    meter.step(1, 4, STEP, queue_ready=7)
    (row,) = rows
    # over 2 s
    assert (row["trained_tokens_per_s"], row["generators_tokens_per_s"]) == (50.0, 150.0)
    assert (row["elapsed_s"], row["left_s"], row["queue_ready"]) == (2.0, 6.0, 7)
    totals = {
        "steps": 1,
        "trained_tokens": 100,
        "trained_tokens_per_s": 50.0,
        "max_lag_seen": 2,
        "wall_s": 2.0,
    }
    assert meter.summary().items() >= totals.items()


def test_what_no_token_has_is_null_in_the_row():
    rows, clock = [], Clock()
    meter = Meter([rows.append], clock)
    meter.start()
    clock.now = 1.0
    meter.step(1, 4, STEP | {"kept_right": float("nan")})
    assert rows[0]["kept_right"] is None and rows[0]["kl"] == 0.25


def test_it_knows_the_step_of_the_last_row_also_behind_a_checkpoint():
    clock = Clock()
    meter = Meter([], clock)
    meter.start(version=7)
    assert meter.last_step == 7
    clock.now = 1.0
    meter.step(8, 9, STEP)
    assert meter.last_step == 8


def test_shares_of_time_are_means_over_a_roles_actors_since_the_last_row_and_over_the_run():
    rows, clock = [], Clock()
    meter = Meter([rows.append], clock)
    first, second = meter.actor("generators"), meter.actor("generators")
    first.enter("busy")
    clock.now = 100.0
    meter.start()  # what came before does not count
    clock.now = 101.0
    second.enter("syncing")  # starved until now
    clock.now = 104.0
    first.enter("blocked")
    meter.step(1, 2, STEP)
    clock.now = 106.0
    meter.step(2, 2, STEP)

    def shares(row):
        return {state: row[f"generators_{state}"] for state in STATES}

    # of 2 x 4 s
    assert shares(rows[0]) == dict(busy=0.5, starved=0.125, blocked=0.0, syncing=0.375, down=0.0)
    # of 2 x 2 s
    assert shares(rows[1]) == dict(busy=0.0, starved=0.0, blocked=0.5, syncing=0.5, down=0.0)
    clock.now = 200.0  # what comes after the last row does not count either
    assert shares(meter.summary()) == pytest.approx(
        dict(busy=4 / 12, starved=1 / 12, blocked=2 / 12, syncing=5 / 12, down=0)
    )


def test_the_table_of_times_has_a_line_a_role():
    summary = {f"{role}_{state}": 0.0 for role in ROLES for state in STATES}
    lines = time_table(summary | {"teachers_busy": 0.25, "teachers_starved": 0.75}).splitlines()
    assert lines[0].split() == [
        "share",
        "of",
        "time",
        "busy",
        "starved",
        "blocked",
        "syncing",
        "down",
    ]
    assert lines[2].split() == ["teachers", "25.0%", "75.0%", "0.0%", "0.0%", "0.0%"]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_role_that_only_some_runs_have_is_in_their_rows_and_their_table():
    rows, clock = [], Clock()
    meter = Meter([rows.append], clock)
    meter.actor("reference").enter("busy")
    meter.start()
    clock.now = 2.0
    meter.step(1, 1, STEP)
    assert rows[0]["reference_busy"] == 1.0
    assert time_table(meter.summary()).splitlines()[-1].split()[:2] == ["reference", "100.0%"]


def test_a_jsonl_row_is_on_disk_before_the_call_returns(tmp_path):
    sink = Jsonl(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        sink({"step": step})
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {
            "step": step
        }


def test_half_a_row_that_a_kill_left_costs_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"st')
    sink = Jsonl(path)
    for step in (2, 3):
        sink({"step": step})
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'


def test_a_disk_that_fills_up_within_a_row_leaves_whole_rows_and_takes_the_next_once_there_is_room(
    tmp_path,
):
    path, (soft, hard) = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    sink = Jsonl(path)
    sink({"step": 1})
    # a write stops there
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match=r"5 of 12 bytes of a row fit.*metrics\.jsonl"):
            sink({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_rows_beyond_the_backlog_of_an_observer_that_blocks_are_lost_and_counted():
    release, entered = threading.Event(), threading.Event()
    taken = []

    def block(row):
        entered.set()
        release.wait(60)
        taken.append(row["step"])

    with observed({"slow": lambda: block}) as (observer,):
        observer({"step": 0})
        assert entered.wait(60)
        for step in range(1, OBSERVER_BACKLOG + 6):
            observer({"step": step})
        release.set()
    assert observer.lost == 5
    assert taken == list(range(OBSERVER_BACKLOG + 1))


def test_an_observer_that_blocks_for_ever_holds_up_the_end_for_a_bounded_time_only(
    monkeypatch,
):
    monkeypatch.setattr(metrics, "CLOSE_S", 0.2)
    release = threading.Event()
    stuck = {name: lambda: lambda row: release.wait(60) for name in ("one", "two")}
    started = time.monotonic()
    with observed(stuck) as observers:
        for observer in observers:
            for step in range(3):
                observer({"step": step})
    # once for all of them, and not the 60 s that they take
    assert 0.2 <= time.monotonic() - started < 30
    assert [observer.lost for observer in observers] == [3, 3]
    release.set()


@pytest.mark.parametrize("ended", ["well", "by an error"])
def test_an_observer_that_is_behind_gets_all_its_rows_at_the_end(ended):
    taken = []

    def slow(row):
        time.sleep(0.002)
        taken.append(row["step"])

    try:
        with observed({"slow": lambda: slow}) as (observer,):
            for step in range(100):
                observer({"step": step})
            if ended != "well":
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert taken == list(range(100))
    assert observer.lost == 0


@pytest.mark.parametrize(
    ("fails", "lost"),
    {
        "to start, always": ({"start": range(9)}, 4),
        "to start, twice": ({"start": range(2)}, 2),
        "with every row": ({"row": range(9)}, 4),
        "with the second row": ({"row": [1]}, 1),
    }.values(),
)
def test_an_observer_that_raises_loses_those_rows_and_says_so_once(fails, lost, capsys):
    calls = {"start": 0, "row": 0}

    def call(what):
        calls[what] += 1
        if calls[what] - 1 in fails.get(what, ()):
            raise OSError("disk full")

    def start():
        call("start")
        return lambda row: call("row")

    with observed({"file": start}) as (observer,):
        for step in range(4):
            observer({"step": step})
    assert observer.lost == lost
    assert capsys.readouterr().err == "observer file: OSError: disk full\n"


def test_a_sink_is_closed_behind_its_last_row_and_an_error_in_that_is_said_like_any_other(capsys):
    class File:
        def __init__(self):
            self.rows, self.closed = [], []

        def __call__(self, row):
            self.rows.append(row)

        def close(self):
            self.closed.append(len(self.rows))
            raise OSError("disk full")

    file = File()
    with observed({"file": lambda: file}) as (observer,):
        observer({"step": 1})
        observer({"step": 2})
    assert (file.closed, observer.lost) == ([2], 0)
    assert capsys.readouterr().err == "observer file: OSError: disk full\n"
