"""What a check can do to the worker it runs in, with a fake math-verify that does it."""

import asyncio
import os
import subprocess
import sys

import msgspec
import pytest

from async_opd.core.errors import ActorLost
from async_opd.roles.verifier.config import VerifyConfig
from tests.roles.verifier.conftest import WITHIN_S, runs, until

WRITE = (
    "[os.write(fd, {!r}) for fd in range(3, 9) if os.path.exists(f'/proc/self/fd/{{fd}}') and"
    " WRITABLE(fd)]"
)
WRITABLE = "import fcntl\ndef WRITABLE(fd): return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY"


async def test_a_check_that_prints_or_reads_leaves_the_protocol_alone(
    start_pool, check, fake_math_verify
):
    fake_math_verify(
        top="print('importing', flush=True)",
        body=(
            "os.write(1, b'raw'); print('parsing', flush=True); os.system('echo child'); assert not"
            " sys.stdin.read()"
        ),
    )
    pool = await start_pool()
    verdicts = await asyncio.gather(*(pool.check(check(r"\boxed{3}")) for _ in range(3)))
    assert [verdict.correct for verdict in verdicts] == [True, True, True]


@pytest.mark.parametrize(
    ("garbage", "cause"),
    [
        (b"\xff\xff\xff\xff", "malformed reply (WireError)"),  # a length of 4 GiB
        # more than the pipe holds
        (b"\xff\xff\xff\xff" + b"x" * 1_000_000, "malformed reply (WireError)"),
        (b"\x00\x00\x00\x03abc", "malformed reply (ValidationError)"),  # msgpack, of an int
        (b"\x00\x00\x00\x03\xa2\xff\xff", "malformed reply (ValidationError)"),
        (b"\x00\x00\x00\x09\x93\xa5wrong\xc0\xa0", "malformed reply (WireError)"),
        (b"\x00\x00\x00\x00", "malformed reply (DecodeError)"),
    ],
    ids=["oversized", "flood", "not a verdict", "not text", "of another check", "empty"],
)
async def test_a_malformed_reply_is_unknown_and_its_worker_replaced(
    garbage, cause, start_pool, check, fake_math_verify, workers
):
    fake_math_verify(top=WRITABLE, body=f"'3' in text and {WRITE.format(garbage)}")
    pool = await start_pool()
    (before,) = workers()
    verdict = await pool.check(check(r"\boxed{3}"))
    assert (verdict.correct, verdict.cause) == (None, cause)
    assert (await pool.check(check(r"\boxed{4}"))).correct is True
    assert workers() != [before]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x03abc",
        b"\x00\x00\x00\x02\x91\xa1",
        b"\x00\x00\x00\x09abc",
        b"\x00\x00\x00\x00",
    ],
    ids=["oversized", "not a check", "cut msgpack", "cut frame", "empty"],
)
def test_a_malformed_request_ends_a_worker_with_no_reply(garbage, fake_math_verify):
    fake_math_verify()
    config = msgspec.json.encode(VerifyConfig(check="math_verify")).decode()
    command = [sys.executable, "-m", "async_opd.roles.verifier.worker", str(os.getpid()), config]
    worker = subprocess.run(command, input=garbage, capture_output=True, timeout=30)
    assert (worker.returncode, worker.stdout) == (1, b"\0\0\0\0")


async def test_a_check_that_kills_its_worker_is_unknown_and_tried_once(
    start_pool, check, fake_math_verify, tmp_path
):
    fake_math_verify(
        body=f"open({str(tmp_path / 'tries')!r}, 'a').write('x'); '3' in text and os._exit(1)"
    )
    pool = await start_pool()
    verdict = await pool.check(check(r"\boxed{3}", answer="3.0"))
    assert (verdict.correct, verdict.cause) == (None, "worker died (exit 1)")
    assert (tmp_path / "tries").read_text() == "x"
    assert (await pool.check(check(r"\boxed{4}"))).correct is True


async def test_a_check_that_raises_is_unknown_and_keeps_its_worker(
    start_pool, check, fake_math_verify, workers
):
    fake_math_verify(body="raise KeyError(text)")
    pool = await start_pool()
    before = workers()
    verdict = await pool.check(check(r"\boxed{3}"))
    assert (verdict.correct, verdict.cause) == (None, "check raised KeyError")
    assert workers() == before


async def test_a_check_that_swallows_a_memory_error_is_unknown(start_pool, check, fake_math_verify):
    fake_math_verify(
        body=(
            "kept = []\n    try:\n        while True: kept.append(bytes(8 << 20))\n    except"
            " MemoryError: pass"
        )
    )
    pool = await start_pool(memory_gib=0.5)
    verdict = await pool.check(check(r"\boxed{3}"))
    assert (verdict.correct, verdict.cause) == (None, "worker died (exit 1)")


async def test_what_a_hanging_check_started_dies_with_it(
    start_pool, check, fake_math_verify, workers
):
    fake_math_verify(body="os.system('sleep 60')")
    pool = await start_pool(timeout_s=2.0)
    pending = asyncio.create_task(pool.check(check(r"\boxed{3}")))
    (worker,) = workers()
    await until(lambda: "sleep" in [child.name() for child in worker.children(recursive=True)])
    started = worker.children(recursive=True)
    assert (await pending).correct is None
    await until(lambda: not any(map(runs, started)))


async def test_a_slow_start_does_not_count_against_a_check(start_pool, check, fake_math_verify):
    fake_math_verify(top="time.sleep(0.9)", body="'3' in text and os._exit(1)")
    pool = await start_pool(timeout_s=0.7)
    verdicts = await asyncio.gather(*(pool.check(check(rf"\boxed{{{n}}}")) for n in (3, 4)))
    assert [verdict.correct for verdict in verdicts] == [None, True]


async def test_three_failed_starts_in_a_row_are_an_error(start_pool, fake_math_verify):
    fake_math_verify(top="sys.exit(7)")
    with pytest.raises(
        ActorLost, match=r"3 starts in a row failed, last .*worker died \(exit 7\) while starting"
    ):
        await start_pool()


async def test_a_start_that_hangs_is_an_error(start_pool, fake_math_verify):
    fake_math_verify(top="time.sleep(60)")
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(ActorLost, match=r"timed out after 0\.2 s while starting"):
            await start_pool(start_timeout_s=0.2)


async def test_replacements_that_do_not_start_fail_what_waits_and_what_comes(
    start_pool, check, fake_math_verify
):
    fake_math_verify(body="os._exit(1)")
    pool = await start_pool()
    fake_math_verify(top="sys.exit(7)")
    crashed, *waiting = await asyncio.gather(
        *(pool.check(check(r"\boxed{3}")) for _ in range(3)), return_exceptions=True
    )
    assert crashed.cause == "worker died (exit 1)"
    assert [type(error) for error in waiting] == [ActorLost, ActorLost]
    with pytest.raises(ActorLost, match="3 starts in a row failed"):
        await pool.check(check())
