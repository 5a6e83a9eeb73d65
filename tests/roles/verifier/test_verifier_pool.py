import asyncio
import subprocess
import sys
import time

import psutil
import pytest

from async_opd.core.errors import ActorLost
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.roles.verifier.process import WorkerProcess
from tests.roles.verifier.conftest import WITHIN_S, runs, until

PARENT = """
import asyncio, sys
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.core.wire import Check

async def main():
    pool = VerifierPool(VerifyConfig(check="math_verify", workers=2, timeout_s=60.0))
    await pool.start()
    checks = [pool.check(Check(id=str(i), response=sys.argv[1], answer="2")) for i in range(2)]
    print("started", flush=True)
    await asyncio.gather(*checks)

asyncio.run(main())
"""


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def test_verdicts_are_right_or_wrong_and_carry_the_id_of_their_check(start_pool, check):
    pool = await start_pool(workers=2)
    responses = [r"\boxed{2}", r"\boxed{3}", "no idea", r"\boxed{\sqrt{4}}"] * 5
    verdicts = await asyncio.gather(*(pool.check(check(response)) for response in responses))
    assert [verdict.correct for verdict in verdicts] == [True, False, False, True] * 5
    assert [verdict.id for verdict in verdicts] == [f"{i}@0#0" for i in range(20)]
    assert {verdict.cause for verdict in verdicts} == {""}


async def test_a_right_answer_behind_hanging_ones_is_still_right(start_pool, check, patient):
    """It waits for a short deadline of each, and not for a whole one."""
    pool = await start_pool(timeout_s=5.0, check=patient.check)
    hung = [asyncio.create_task(pool.check(check("hang"))) for _ in range(2)]
    await asyncio.sleep(0)  # they are first
    async with asyncio.timeout(WITHIN_S):
        assert (await pool.check(check())).correct is True
    assert patient.begun == 2 and not any(task.done() for task in hung)
    await pool.close()
    await asyncio.gather(*hung, return_exceptions=True)


async def test_hanging_answers_are_wrong_and_as_many_good_ones_beside_them_right(
    start_pool, check, own_check
):
    """They burn a core; only a check that can be interrupted would ever hear of its deadline."""
    own_check("def deaf(response, answer):\n    return bool(response != 'hang' or 9**9**9**9)")
    pool = await start_pool(timeout_s=0.6, check="mine:deaf", workers=2)
    asked = ["hang", "2"] * 6
    verdicts = await asyncio.gather(*(pool.check(check(response)) for response in asked))
    assert [verdict.correct for verdict in verdicts[1::2]] == [True] * 6
    wrong = [verdict for verdict in verdicts[::2] if verdict.correct is not None]
    assert wrong  # of the others the worker had too little of a core
    assert {(verdict.correct, verdict.cause) for verdict in wrong} == {
        (False, "timed out after 0.6 s, a second time, alone")
    }


async def test_a_hanging_check_is_asked_once_more_at_its_whole_deadline_and_its_worker_replaced(
    start_pool, check, workers, hangs
):
    pool = await start_pool(timeout_s=1.0)
    (before,) = workers()
    started = time.monotonic()
    assert await pool.check(check(hangs)) == Verdict(
        id="0@0#0", reward=0.0, cause="timed out after 1.0 s, a second time, alone", answer=""
    )
    assert time.monotonic() - started >= 1.25
    assert not before.is_running()
    assert (await pool.check(check())).correct is True
    assert workers() != [before]


async def test_a_worker_killed_mid_check_is_unknown_and_replaced(
    start_pool, check, workers, patient
):
    pool = await start_pool(check=patient.check)
    pending = asyncio.create_task(pool.check(check("hang")))
    await until(lambda: patient.begun)
    workers()[0].kill()
    assert await pending == Verdict(id="0@0#0", reward=None, cause="worker died (signal 9)")
    assert (await pool.check(check())).correct is True


async def test_a_worker_killed_while_idle_costs_no_check(start_pool, check, workers, patient):
    pool = await start_pool(check=patient.check)
    (worker,) = workers()
    worker.kill()
    await until(lambda: not psutil.pid_exists(worker.pid))  # it has been reaped,
    await asyncio.sleep(0.2)  # and the pool has heard of it
    assert (await pool.check(check())).correct is True


async def test_no_worker_outlives_a_parent_killed_in_the_middle_of_checks(hangs):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, hangs], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "started\n"
        busy = psutil.Process(parent.pid).children()
        assert len(busy) == 2
        for worker, before in [(worker, cpu_s(worker)) for worker in busy]:
            # it is at its check
            await until(lambda worker=worker, before=before: cpu_s(worker) > before + 0.1)
        parent.kill()
    await until(lambda: not any(map(runs, busy)))


async def test_close_kills_busy_workers_and_fails_what_waits(start_pool, check, workers, patient):
    pool = await start_pool(check=patient.check)
    pending = [asyncio.create_task(pool.check(check("hang"))) for _ in range(2)]
    await until(lambda: patient.begun)
    await pool.close()
    assert workers() == []
    for task in pending:
        with pytest.raises(ActorLost, match="verifier pool is closed"):
            await task
    with pytest.raises(ActorLost, match="verifier pool is closed"):
        await pool.check(check())


async def test_close_at_the_moment_a_caller_gives_up_kills_the_workers(
    start_pool, check, workers, patient
):
    pool = await start_pool(check=patient.check)
    impatient, waiting = (asyncio.create_task(pool.check(check("hang"))) for _ in range(2))
    await until(lambda: patient.begun)
    impatient.cancel()
    await pool.close()
    assert workers() == []
    with pytest.raises(ActorLost, match="verifier pool is closed"):
        await waiting


async def test_a_caller_that_gives_up_costs_others_nothing(start_pool, check, patient):
    pool = await start_pool(timeout_s=0.75, check=patient.check)
    abandoned = [asyncio.create_task(pool.check(check("hang"))) for _ in range(5)]
    await until(lambda: patient.begun)
    for task in abandoned:
        task.cancel()
    assert (await pool.check(check())).correct is True
    assert patient.begun == 1  # the four that still queued are skipped


async def test_a_pool_that_is_not_started_refuses(check):
    with pytest.raises(ActorLost, match="verifier pool is not started"):
        await VerifierPool(VerifyConfig()).check(check())


async def test_a_stopped_worker_costs_its_check_nothing_and_is_replaced(
    start_pool, check, workers, patient
):
    pool = await start_pool(timeout_s=0.75, check=patient.check)
    (before,) = workers()
    before.suspend()
    assert (await pool.check(check())).correct is True
    assert not before.is_running()
    assert len(workers()) == 1


async def test_a_check_that_is_late_twice_in_a_stopped_worker_is_unknown(
    start_pool, check, workers, patient
):
    """A machine that stands still is no answer that hangs."""
    pool = await start_pool(timeout_s=1.0, check=patient.check)
    pending = asyncio.create_task(pool.check(check("hang")))
    await until(lambda: patient.begun == 2)
    workers()[0].suspend()
    verdict = await pending
    assert (verdict.correct, verdict.cause) == (None, "timed out after 1.0 s")


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("time.sleep(3600)", "late"),
        ("time.sleep(0.6)", "too near its deadline"),
        ("os._exit(1)", "crashed"),
        ("raise KeyError", "not decided"),
    ],
)
async def test_a_check_that_is_late_twice_is_unknown_where_its_reference_is_not_decided_in_time(
    start_pool, check, own_check, reference, why
):
    own_check(f"""
import os, time
def patient(response, answer):
    if response == "hang":
        time.sleep(3600)
    {reference}
""")
    pool = await start_pool(timeout_s=0.8, check="mine:patient")
    verdict = await pool.check(check("hang"))
    cause = "worker died (exit 1)" if why == "crashed" else "timed out after 0.8 s"
    assert (verdict.correct, verdict.cause) == (None, cause)


async def test_a_check_that_is_late_and_then_crashes_is_unknown(
    start_pool, check, own_check, tmp_path
):
    own_check(f"""
import os, time
def patient(response, answer):
    if response == "hang":
        if os.path.exists({str(tmp_path / "once")!r}):
            os._exit(3)
        open({str(tmp_path / "once")!r}, "w")
        time.sleep(3600)
    return True
""")
    verdict = await (await start_pool(check="mine:patient", timeout_s=1.0)).check(check("hang"))
    assert (verdict.correct, verdict.cause) == (None, "worker died (exit 3)")


async def test_a_slow_check_has_its_whole_deadline(start_pool, check, own_check):
    own_check("import time\ndef slow(response, answer):\n    time.sleep(0.4)\n    return True")
    pool = await start_pool(check="mine:slow", timeout_s=1.2)
    for _ in range(2):
        assert (await pool.check(check())).correct is True


async def test_what_checks_usually_take_is_soon_no_reason_to_ask_twice(
    start_pool, check, own_check, tmp_path
):
    own_check(f"""
import time
def slow(response, answer):
    with open({str(tmp_path / "asked")!r}, "a") as file:
        file.write("x")
    time.sleep(0.3)
    return True
""")
    pool = await start_pool(check="mine:slow", timeout_s=1.5)
    for _ in range(3):
        assert (await pool.check(check())).correct is True
    # the first was asked twice, each time after its reference: no more than 0.25 s were allowed
    assert (tmp_path / "asked").read_text() == "x" * 6


async def test_what_a_library_does_once_a_process_makes_no_check_late(
    start_pool, check, workers, own_check
):
    own_check("""
import time
loaded = []
def lazy(response, answer):
    if response == "hang":
        time.sleep(3600)
    if not loaded:
        time.sleep(0.6)
        loaded.append(1)
    return True
""")
    pool = await start_pool(check="mine:lazy", timeout_s=3.0)
    before = workers()
    assert (await pool.check(check())).correct is True
    assert workers() == before
    asked = [asyncio.create_task(pool.check(check(text))) for text in ["hang", "2"] * 3]
    began = time.monotonic()
    assert [(await task).correct for task in asked[1::2]] == [True] * 3
    assert time.monotonic() - began < 3 * 3.0  # no hanging one had its whole deadline before
    await pool.close()
    await asyncio.gather(*asked, return_exceptions=True)


async def test_a_worker_that_dies_is_not_late_because_the_check_before_was(workers):
    worker = await WorkerProcess.spawn(VerifyConfig(check="code", sandbox="none"), WITHIN_S)
    late = Check(id="0", response="while 1: pass", answer='{"inputs": [""], "outputs": ["2"]}')
    await worker.ask(late, WITHIN_S, 0.3)
    assert worker.late and worker.alive
    asked = asyncio.create_task(worker.ask(late, WITHIN_S, WITHIN_S))
    await asyncio.sleep(0.1)
    workers()[0].kill()
    assert (await asked).cause == "worker died (signal 9)"
    assert not worker.late


@pytest.mark.parametrize("id", ["i" * 100_000, "\ud800", "\0", "", "ü" * 3000])
async def test_an_id_of_any_length_and_letters_comes_back(start_pool, patient, id):
    pool = await start_pool(check=patient.check)
    for _ in range(2):
        verdict = await pool.check(Check(id=id, response="2", answer="2"))
        assert (verdict.id, verdict.correct) == (id, True)


@pytest.mark.parametrize(
    ("response", "answer"), [("\ud800", "2"), ("2", "\udfff"), (r"\boxed{\ud800}", "2")]
)
async def test_half_a_character_costs_no_worker(start_pool, check, workers, response, answer):
    pool = await start_pool(check="exact")
    before = workers()
    assert (await pool.check(check(response, answer))).correct is False
    assert workers() == before
