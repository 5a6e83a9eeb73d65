import asyncio
import subprocess
import sys
import time

import psutil
import pytest

from async_opd.core.errors import ActorLost
from async_opd.core.wire import Verdict
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool
from tests.roles.verifier.conftest import runs, until

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
    pool = await start_pool(timeout_s=0.75, check=patient.check)
    started = time.monotonic()
    *hung, last = await asyncio.gather(
        *(pool.check(check(response)) for response in ["hang", "hang", "2"])
    )
    assert [verdict.correct for verdict in hung] == [None, None]
    assert last.correct is True
    # it waited for two deadlines of 0.75 s, and has one of its own
    assert time.monotonic() - started > 1.5


async def test_a_hanging_check_is_unknown_at_its_deadline_and_its_worker_replaced(
    start_pool, check, workers, hangs
):
    pool = await start_pool(timeout_s=1.0)
    (before,) = workers()
    started = time.monotonic()
    assert await pool.check(check(hangs)) == Verdict(
        id="0@0#0", correct=None, cause="timed out after 1.0 s"
    )
    assert time.monotonic() - started >= 1.0
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
    assert await pending == Verdict(id="0@0#0", correct=None, cause="worker died (signal 9)")
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


@pytest.mark.parametrize("busy", [True, False], ids=["in a check", "idle"])
async def test_a_stopped_worker_is_unknown_at_the_deadline_and_replaced(
    start_pool, check, workers, patient, busy
):
    pool = await start_pool(timeout_s=0.75, check=patient.check)
    (before,) = workers()
    pending = asyncio.create_task(pool.check(check("hang"))) if busy else None
    if busy:
        await until(lambda: patient.begun)
    before.suspend()
    verdict = await (pending or pool.check(check()))
    assert (verdict.correct, verdict.cause) == (None, "timed out after 0.75 s")
    assert not before.is_running()
    assert (await pool.check(check())).correct is True
    assert len(workers()) == 1
