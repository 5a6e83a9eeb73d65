from collections.abc import Callable
from itertools import count

import psutil
import pytest

from async_opd.verify.config import VerifyConfig
from async_opd.verify.pool import VerifierPool
from async_opd.wire import Check


@pytest.fixture
def hangs() -> str:
    """A response whose check does not end: math-verify evaluates it, and one step in C alone takes for ever."""
    return r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def check() -> Callable[..., Check]:
    """Makes a check: of "\\boxed{2}" against "2" unless told otherwise."""
    ids = count()
    return lambda response=r"\boxed{2}", answer="2": Check(id=f"{next(ids)}@0#0", response=response, answer=answer)


@pytest.fixture
def workers() -> Callable[[], list[psutil.Process]]:
    """Lists the live worker processes of this one."""
    return lambda: [child for child in psutil.Process().children() if "async_opd.verify.worker" in child.cmdline()]


@pytest.fixture
async def start_pool(workers):
    """Starts a pool, of one worker and a deadline of 1 s unless told otherwise; no worker outlives the test."""
    pools = []

    async def start(start_timeout_s: float = 60.0, **settings) -> VerifierPool:
        pools.append(VerifierPool(VerifyConfig(**{"timeout_s": 1.0} | settings), start_timeout_s))
        await pools[-1].start()
        return pools[-1]

    yield start
    for pool in pools:
        await pool.close()
    assert workers() == []


@pytest.fixture
def fake_math_verify(tmp_path, monkeypatch):
    """Puts a module in the place of math-verify: `top` runs on import, `body` for each `parse(text)`."""

    def write(body: str = "pass", top: str = "pass") -> None:
        source = f"import os, sys, time\n{top}\ndef parse(text, **_):\n    {body}\n    return [text]\n"
        tmp_path.joinpath("math_verify.py").write_text(f"{source}def verify(*_, **__):\n    return True\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    return write
