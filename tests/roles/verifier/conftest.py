import asyncio
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import pytest

from async_opd.core.wire import Check
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool
from tests.processes import command_line

WITHIN_S = 30.0  # for what happens soon: on a busy machine not at once


async def until(happened: Callable[[], object]) -> None:
    """Waits for what happens soon."""
    async with asyncio.timeout(WITHIN_S):
        while not happened():
            await asyncio.sleep(0.01)


def runs(process: psutil.Process) -> bool:
    """Whether it is neither gone nor a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def hangs() -> str:
    """A response whose check does not end: math-verify evaluates it, and one step in C alone takes
    for ever."""
    return r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def check() -> Callable[..., Check]:
    """Makes a check: of "\\boxed{2}" against "2" unless told otherwise."""
    ids = count()
    return lambda response=r"\boxed{2}", answer="2": Check(
        id=f"{next(ids)}@0#0", response=response, answer=answer
    )


@pytest.fixture
def workers() -> Callable[[], list[psutil.Process]]:
    """Lists the live worker processes of this one."""
    return lambda: [
        child
        for child in psutil.Process().children()
        if "async_opd.roles.verifier.worker" in command_line(child)
    ]


@pytest.fixture
async def start_pool(workers):
    """Starts a pool, of the plain library, one worker and a generous deadline unless told
    otherwise; no worker outlives the test."""
    pools = []

    async def start(start_timeout_s: float = 60.0, **settings) -> VerifierPool:
        pools.append(
            VerifierPool(
                VerifyConfig(**{"check": "math_verify", "timeout_s": WITHIN_S} | settings),
                start_timeout_s,
            )
        )
        await pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        await pool.close()
    assert workers() == []


@pytest.fixture
def worker_module(tmp_path, monkeypatch):
    """Puts a module where workers find it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return lambda name, source: tmp_path.joinpath(f"{name}.py").write_text(source)


@pytest.fixture
def own_check(worker_module):
    """Puts a module `mine` where workers find it."""
    return partial(worker_module, "mine")


class Patient:
    """A check that hangs on "hang", and finds everything else right. Its workers start sooner than
    math-verify's."""

    check = "mine:patient"

    def __init__(self, log: Path):
        self._log = log
        log.touch()

    @property
    def begun(self) -> int:
        """How many hanging checks have begun."""
        return self._log.stat().st_size


@pytest.fixture
def patient(own_check, tmp_path) -> Patient:
    log = tmp_path / "begun"
    own_check(f"""
import time
def patient(response, answer):
    if response == "hang":
        with open({str(log)!r}, "a") as file:
            file.write("x")
        time.sleep(3600)
    return True
""")
    return Patient(log)


@pytest.fixture
def fake_math_verify(worker_module):
    """Puts a module in the place of math-verify: `top` runs on import, `body` for each
    `parse(text)`."""
    return lambda body="pass", top="pass": worker_module(
        "math_verify",
        f"import os, sys, time\n{top}\ndef parse(text, **_):\n    {body}\n    return [text]\n"
        "def verify(*_, **__):\n    return True\n",
    )
