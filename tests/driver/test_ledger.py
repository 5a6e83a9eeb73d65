import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import tracemalloc

import pytest

from async_opd.core.errors import DataError, LedgerError
from async_opd.driver.ledger import Ledger, Trained, records


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def limited():
    """Lets no file of this process grow beyond `limited(bytes)`: the disk then refuses in the
    middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def written(path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_every_event_is_a_short_array_a_line(path):
    ledger = Ledger(path)
    for id in "abc":
        ledger.handed_out(f"{id}@0")
    ledger.returned("a@0", "generator 0 died")
    ledger.reissued("b@0", 1, "stale")
    ledger.trained(1, ["b@0"])
    ledger.dropped("c@0", "truncated")
    assert ledger.checkpoint(1) == ["a@0"]
    await ledger.sync()
    ledger.resumed(1, ["a@0"])
    ledger.handed_out("a@0")
    ledger.trained(2, ["a@0"])
    ledger.finished()
    ledger.close()
    assert written(path) == [
        ["out", 1, "a@0"],
        ["out", 2, "b@0"],
        ["out", 3, "c@0"],
        ["returned", 4, "a@0", "generator 0 died"],
        ["reissued", 5, "b@0", 1, "stale"],
        ["trained", 6, 1, ["b@0"]],
        ["dropped", 7, "c@0", "truncated"],
        ["checkpoint", 8, 1],
        ["resumed", 9, 1, ["a@0"]],
        ["out", 10, "a@0"],
        ["trained", 11, 2, ["a@0"]],
        ["finished", 12],
    ]


def test_outstanding_is_what_is_out_and_has_no_end_in_the_order_of_the_first_hand_out(path):
    ledger = Ledger(path)
    for id in "abcde":
        ledger.handed_out(id)
    ledger.reissued("a", 1, "stale")
    ledger.returned("b", "left")
    ledger.trained(1, ["d"])
    ledger.dropped("c", "stale")
    assert list(ledger.outstanding) == ["a", "b", "e"]
    ledger.resumed(0, ["x", "y"])
    ledger.handed_out("y")
    assert list(ledger.outstanding) == ["x", "y"]
    ledger.close()


async def test_nothing_grows_while_groups_come_and_go(path):
    ledger, held = Ledger(path), {100: 0, 300: 0}
    tracemalloc.start()
    try:
        for step in range(1, 301):
            ids = [f"{step}.{group}" for group in range(8)]
            for id in ids:
                ledger.handed_out(id)
            ledger.trained(step, ids)
            await ledger.sync()
            if step in held:
                held[step] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held[300] - held[100] < 5_000  # bytes, in 1,600 groups; their lines have 50,000
    ledger.close()


def test_an_end_of_what_is_not_outstanding_is_a_bug(path):
    ledger = Ledger(path)
    ledger.handed_out("a")
    ledger.trained(1, ["a"])
    for end in (lambda: ledger.trained(2, ["a"]), lambda: ledger.dropped("a", "stale")):
        with pytest.raises(KeyError, match="a"):
            end()
    ledger.close()


def test_two_rows_of_one_id_are_refused_by_name(path):
    ledger = Ledger(path)
    ledger.handed_out("a@0")
    with pytest.raises(
        DataError, match="prompt a@0: handed out while it is outstanding: rows share an id"
    ):
        ledger.handed_out("a@0")
    ledger.resumed(0, ["a@0"])
    ledger.handed_out("a@0")  # once more
    with pytest.raises(DataError, match="prompt a@0"):
        ledger.handed_out("a@0")
    ledger.close()


async def test_nothing_is_on_disk_before_a_sync_and_everything_after_it(path):
    ledger = Ledger(path)
    ledger.handed_out("a")
    assert path.read_bytes() == b""
    await ledger.sync()
    assert written(path) == [["out", 1, "a"]]
    ledger.handed_out("b")
    ledger.close()
    assert len(written(path)) == 2


async def test_a_sync_fsyncs_its_batch_once_off_the_event_loop(path, monkeypatch):
    ledger, synced, fsync = Ledger(path), [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (synced.append((threading.current_thread(), os.fstat(fd))), fsync(fd)),
    )
    for number in range(100):
        ledger.handed_out(str(number))
    await ledger.sync()
    ((thread, stat),) = synced
    assert thread is not threading.main_thread() and stat.st_size == path.stat().st_size > 0
    ledger.close()


async def test_batches_keep_their_order_whoever_waits_for_them(path, monkeypatch):
    ledger, release, fsync = Ledger(path), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (release.wait(60), fsync(fd)))
    syncs = []
    for number in range(5):
        ledger.handed_out(str(number))
        syncs.append(asyncio.ensure_future(ledger.sync()))
        await asyncio.sleep(0)
    for cancelled in syncs[1:3]:  # as by Ctrl-C: their batches are written all the same
        cancelled.cancel()
    release.set()
    await asyncio.gather(*syncs, return_exceptions=True)
    ledger.close()
    assert written(path) == [["out", number + 1, str(number)] for number in range(5)]


async def test_a_disk_that_refuses_is_an_error_by_name_then_and_ever_after(path, limited):
    ledger = Ledger(path)
    for number in range(100):
        ledger.handed_out(str(number))
    limited(1000)
    with pytest.raises(LedgerError, match=r"ledger.jsonl: File too large"):
        await ledger.sync()
    limited(10**6)
    ledger.handed_out("more")
    with pytest.raises(LedgerError, match=r"ledger.jsonl: File too large"):
        await ledger.sync()  # it would follow a torn line
    with pytest.raises(LedgerError, match=r"ledger.jsonl: File too large"):
        ledger.close()
    assert path.stat().st_size == 1000
    again = Ledger(path)
    again.handed_out("more")
    again.close()
    *kept, last = written(path)
    assert kept == [["out", number + 1, str(number)] for number in range(len(kept))]
    assert last == ["out", len(kept) + 1, "more"]


@pytest.mark.parametrize("torn", ["", '["out",3', '["out",3,"c"]', "\0\0\0"])
def test_an_existing_file_is_continued_less_a_torn_last_line(path, torn):
    path.write_text('["out",1,"a"]\n["out",2,"b"]\n' + torn)
    ledger = Ledger(path)
    ledger.resumed(0, [])
    ledger.close()
    assert written(path) == [["out", 1, "a"], ["out", 2, "b"], ["resumed", 3, 0, []]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('["out",2', "Input data was truncated"),
        ("", "Input data was truncated"),
        ('["lost",2,"b"]', "Invalid value 'lost'"),
        ('["out",2]', "at least length 3"),
        ('["out",2,"b","c"]', "at most length"),
        ('["out","2","b"]', "Expected `int`"),
        ('{"n":2}', "Expected `array`"),
        ("\udcff", "malformed"),
    ],
)
def test_a_torn_line_elsewhere_is_refused_by_its_number(path, line, says):
    path.write_text(f'["out",1,"a"]\n{line}\n["out",3,"c"]\n', errors="surrogateescape")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=rf"ledger.jsonl, line 2: not a record: .*{says}"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_record_that_is_missing_before_the_end_is_refused_by_its_line(path):
    path.write_text('["out",1,"a"]\n["out",2,"b"]\n["out",4,"c"]\n')
    with pytest.raises(LedgerError, match=r"line 2: record 2 stands before record 4$"):
        Ledger(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LedgerError, match=r"no/ledger.jsonl: No such file or directory"):
        Ledger(tmp_path / "no" / "ledger.jsonl")


WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from async_opd.driver.ledger import Ledger

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    for step in itertools.count(1):
        ids = [f"{step}.{group}" for group in range(500)]
        for id in ids:
            ledger.handed_out(id)
        ledger.trained(step, ids)
        await ledger.sync()
        print(step, flush=True)

asyncio.run(main())
"""


def test_a_killed_writer_has_lost_nothing_that_was_synced(path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    for _ in range(20):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    printed = writer.communicate()[0].split()
    synced = int(printed[-1]) if printed else 20
    ledger = Ledger(path)
    ledger.finished()
    ledger.close()
    kept = [record for _, record in records(path)]
    assert [record.n for record in kept] == list(range(1, len(kept) + 1))
    steps = [record.step for record in kept if isinstance(record, Trained)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= synced
