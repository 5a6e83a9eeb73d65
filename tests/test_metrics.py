import json
import threading

import pytest

from async_opd.metrics import OBSERVER_BACKLOG, Console, Jsonl, Meter, Observed

STEP = {"tokens": 100.0, "lag_max": 2.0, "lag_mean": 1.0, "loss": 0.5, "kl": 0.25}


def test_a_row_holds_the_learners_metrics_and_the_rates(monkeypatch):
    rows, now = [], iter([0.0, 10.0, 12.0])
    monkeypatch.setattr("async_opd.metrics.time.monotonic", lambda: next(now))
    meter = Meter([rows.append])
    meter.start()
    meter.count("generators", 300)
    meter.step(1, 4, STEP, queue_ready=7)
    (row,) = rows
    assert (row["trained_tokens_per_s"], row["generators_tokens_per_s"]) == (50.0, 150.0)  # over 2 s
    assert (row["elapsed_s"], row["left_s"], row["queue_ready"]) == (2.0, 6.0, 7)
    assert meter.summary() == {
        "steps": 1, "trained_tokens": 100, "trained_tokens_per_s": 50.0, "max_lag_seen": 2, "wall_s": 2.0
    }  # fmt: skip


def test_jsonl_rows_are_on_disk_at_once(tmp_path):
    sink = Jsonl(tmp_path / "metrics.jsonl")
    sink({"step": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}
    sink.close()


def test_the_console_prints_what_the_reader_needs(capsys):
    row = STEP | {"step": 1, "accuracy": None, "queue_ready": 3, "left_s": 9.0}
    row |= {f"{role}_tokens_per_s": 10.0 for role in ("generators", "teachers", "trained")}
    Console(steps=5)(row)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["step", "accuracy", "kl", "loss"]
    assert line.split()[:4] == ["1/5", "-", "0.2500", "0.5000"]
    assert len(header) == len(line)


def test_an_observer_that_blocks_never_blocks_and_its_lost_rows_are_counted():
    release, entered = threading.Event(), threading.Event()

    def block(row):
        entered.set()
        release.wait(10)

    observer = Observed(lambda: block)
    observer({"step": 0})
    assert entered.wait(5)
    for step in range(OBSERVER_BACKLOG + 5):
        observer({"step": step})
    assert observer.lost == 5
    release.set()
    observer.close(timeout_s=5)


@pytest.mark.parametrize("broken", ["on start", "on every row"])
def test_an_observer_that_raises_is_counted_and_nothing_else(broken, capsys):
    def sink(row):
        raise OSError("disk full")

    def start():
        if broken == "on start":
            raise OSError("disk full")
        return sink

    observer = Observed(start)
    observer({"step": 1})
    observer({"step": 2})
    observer.close(timeout_s=5)
    assert observer.lost == 2
    assert capsys.readouterr().err == "observer: disk full\n"
