import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest

from async_opd.core.aio import bounded, first_cause, in_thread, together
from async_opd.core.errors import ActorLost, TimedOut


async def test_a_wait_that_runs_out_says_who_was_waited_for_and_how_long():
    with pytest.raises(TimedOut, match=r"^generator 3, resume: no answer in 0\.01 s$"):
        await bounded(asyncio.sleep(9), 0.01, "generator 3, resume")


async def test_a_timeout_of_the_awaited_itself_is_not_taken_for_ours():
    async def fails():
        raise TimeoutError("inner")

    with pytest.raises(TimeoutError, match="inner"):
        await bounded(fails(), 5, "anyone")


def test_the_named_error_is_found_inside_nested_groups():
    named = ActorLost("teacher 1 died")
    group = ExceptionGroup("a", [ValueError("x"), ExceptionGroup("b", [KeyError("y"), named])])
    assert first_cause(group) is named


@pytest.mark.parametrize("ends", ["error", "cancelled"])
async def test_what_is_done_together_has_ended_when_one_fails(ends, unheard):
    ended = []

    async def member(name: str):
        try:
            await asyncio.sleep(9)
        finally:
            await asyncio.sleep(0)  # which ending may take
            ended.append(name)

    async def fails():
        await asyncio.sleep(0.01)
        raise ActorLost("teacher 0")

    others = together(member("b"), member("c"))
    calls = together(member("a"), others, *([fails()] if ends == "error" else []))
    whole = asyncio.ensure_future(calls)
    if ends == "cancelled":
        asyncio.get_running_loop().call_later(0.01, whole.cancel)
    with pytest.raises(ActorLost if ends == "error" else asyncio.CancelledError):
        await whole
    assert sorted(ended) == ["a", "b", "c"] and unheard() == []


async def test_what_is_done_together_gives_its_results_in_order():
    async def after(seconds: float):
        await asyncio.sleep(seconds)
        return seconds

    assert await together(after(0.01), after(0.0)) == [0.01, 0.0]
    assert await together() == []


async def answer_after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "here"


@pytest.mark.parametrize("stands_still_s", [0.15, 0.5])
async def test_an_answer_that_came_while_the_loop_stood_still_is_taken(stands_still_s):
    loop = asyncio.get_running_loop()
    answer = loop.create_future()
    threading.Timer(0.05, loop.call_soon_threadsafe, (answer.set_result, "here")).start()
    loop.call_later(0.01, time.sleep, stands_still_s)

    async def chained():  # as a call's result is: through tasks of tasks
        return await asyncio.create_task(bounded(asyncio.shield(answer), 0.1, "inner"))

    assert await bounded(chained(), 0.1, "outer") == "here"


async def test_a_bound_moves_by_the_time_that_the_loop_stood_still():
    asyncio.get_running_loop().call_later(0.01, time.sleep, 1.0)
    # the other side was stopped, too: its answer comes as long after as it would have
    assert await bounded(answer_after(1.2), 0.4, "anyone") == "here"


async def test_who_does_not_answer_is_late_though_the_loop_stood_still():
    began = time.monotonic()
    asyncio.get_running_loop().call_later(0.01, time.sleep, 0.3)
    with pytest.raises(TimedOut, match=r"^anyone: no answer in 0\.2 s$"):
        await bounded(asyncio.sleep(99), 0.2, "anyone")
    assert time.monotonic() - began < 3


async def test_a_loop_that_is_late_all_the_time_still_ends_a_wait():
    async def late():
        while True:
            time.sleep(0.15)
            await asyncio.sleep(0)

    busy = asyncio.create_task(late())
    with pytest.raises(TimedOut):
        await asyncio.wait_for(bounded(asyncio.sleep(99), 0.2, "anyone"), 30)
    busy.cancel()


WAITS = """
import asyncio, sys
from async_opd.core.aio import bounded

async def main():
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )

    async def answer():  # as a call's is: through tasks of tasks
        return await asyncio.create_task(reader.readline())

    print("waits", flush=True)
    print(await bounded(asyncio.create_task(answer()), 0.3, "stdin"), flush=True)

asyncio.run(main())
"""


def test_an_answer_that_came_to_a_stopped_process_is_taken_when_it_goes_on():
    command = [sys.executable, "-c", WAITS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGSTOP)
        process.stdin.write("here\n")
        process.stdin.flush()
        time.sleep(0.6)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "b'here\\n'\n"


async def test_a_thread_has_ended_before_its_caller_is_cancelled():
    ended = []

    def work():
        time.sleep(0.1)
        ended.append("thread")

    working = asyncio.ensure_future(in_thread(work))
    await asyncio.sleep(0.02)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended == ["thread"]
    assert await in_thread(max, 1, 2) == 2
