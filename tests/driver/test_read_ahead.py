"""Prompts that a thread reads before they are wanted."""

import asyncio
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from async_opd.core.errors import DataError
from async_opd.core.wire import Prompt
from async_opd.driver.read_ahead import ReadAhead


class Source:
    """Prompts "0", "1", …; reading the one called `bad` fails, and each takes `seconds`."""

    def __init__(self, bad="", seconds=0.0):
        self.position, self._bad, self._seconds = {"drawn": 0}, bad, seconds
        self.threads = set()

    def __iter__(self):
        while True:
            drawn = self.position["drawn"]
            self.threads.add(threading.current_thread())
            time.sleep(self._seconds)
            if f"{drawn}" == self._bad:
                raise DataError(f"row {drawn}")
            self.position = {"drawn": drawn + 1}
            yield Prompt(id=f"{drawn}", ids=np.zeros(1, np.int32), answer="")

    def continued(self, position, outstanding):
        self.position = position
        return iter(self)


async def test_what_is_read_ahead_is_handed_out_in_order_and_counts_only_then():
    source = Source()
    ahead = ReadAhead(source, 3, 10.0)
    await ahead.read(5)
    assert source.position == {"drawn": 5} and ahead.position == {"drawn": 0}
    ids = []
    for read in range(1, 8):  # two more than were read ahead
        ids.append(next(ahead).id)
        assert ahead.position == {"drawn": read}
    assert ids == ["0", "1", "2", "3", "4", "5", "6"]


async def test_it_goes_on_behind_what_was_handed_out():
    ahead = ReadAhead(Source(), 3, 10.0)
    await ahead.read(5)
    next(ahead)
    again = ReadAhead(Source(), 3, 10.0)
    rows = again.continued(ahead.position, [])
    assert again.position == {"drawn": 1}
    await again.read(2)
    assert next(rows).id == "1"


async def test_the_error_of_a_row_is_raised_where_its_prompt_is_wanted():
    ahead = ReadAhead(Source(bad="2"), 3, 10.0)
    await ahead.read(9)
    assert [next(ahead).id, next(ahead).id] == ["0", "1"]
    with pytest.raises(DataError, match=r"^row 2$"):
        next(ahead)
    assert ahead.position == {"drawn": 2}


async def test_the_loop_goes_on_while_rows_are_read():
    source = Source(seconds=0.1)
    ahead, called, late = ReadAhead(source, 3, 10.0), [], []
    clock = asyncio.get_running_loop().time

    async def tick():
        while True:
            before = clock()
            await asyncio.sleep(0.01)
            late.append(clock() - before - 0.01)

    async with asyncio.TaskGroup() as tasks:
        ticking = tasks.create_task(tick())
        assert not ahead.begin(tasks, 100, 1, lambda: called.append("once"))
        assert not ahead.begin(tasks, 100, 1, lambda: called.append("twice"))
        await asyncio.sleep(0.05)
        await ahead.read(2)
        assert ahead.begin(tasks, 2, 1, lambda: called.append("not at all"))
        ticking.cancel()
    assert called == ["once"] and source.position == {"drawn": 3}  # no more than the most
    assert max(late) < 0.09 and threading.current_thread() not in source.threads


HANGS = """
import asyncio, threading, time
from async_opd.driver import read_ahead

read_ahead.LEAVE_S = 0.1

class Hangs:
    position = {}

    def __iter__(self):
        return self

    def __next__(self):
        threading.Event().wait()

async def main():
    try:
        async with asyncio.TaskGroup() as tasks:
            ahead = read_ahead.ReadAhead(Hangs(), 3, 0.2)
            tasks.create_task(ahead.read(1))
            if CANCELLED:
                await asyncio.sleep(0.1)
                raise KeyError("cancelled")
    except* Exception as group:
        print(repr(group.exceptions[0]))

asyncio.run(main())
"""


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_source_that_hangs_keeps_neither_the_run_nor_its_end_waiting(cancelled):
    code = HANGS.replace("CANCELLED", f"{cancelled}")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    late = "DataError('data.path: the next row: no answer in 0.2 s')"
    assert ran.stdout.strip() == ("KeyError('cancelled')" if cancelled else late), ran.stderr
