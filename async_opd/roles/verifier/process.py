"""One worker process as its parent sees it: started, asked, killed."""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Self

import msgspec

from async_opd.core.aio import within
from async_opd.core.errors import ActorLost, ConfigError, WireError
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.worker import LATE, MAX_REPLY, frame, sound

REAP_S = 5.0  # a killed process that takes longer to go is left to the kernel
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
SERVED = 0.1  # of a deadline that a worker at work must have had of a core, to have been late


def environment(config: VerifyConfig) -> dict[str, str]:
    """Return what a process that runs a check has of this one's environment, where it is set. The
    stacks of more threads would count as its memory."""
    passed = {name: os.environ[name] for name in (*PASSED_ON, *config.env) if name in os.environ}
    return {**passed, "OPENBLAS_NUM_THREADS": "1"}


def command(module: str, config: VerifyConfig) -> list[str]:
    """Return the command of a process of `module`. It writes bytecode where this one may."""
    quiet = ["-B"] if "PYTHONDONTWRITEBYTECODE" in os.environ else []
    settings = msgspec.json.encode(config).decode()
    return [sys.executable, *quiet, "-m", module, str(os.getpid()), settings]


class WorkerProcess:
    """A worker that said it is ready. Made by `spawn`; of no more use once not `alive`."""

    def __init__(self, process: asyncio.subprocess.Process):
        assert process.stdin and process.stdout  # `spawn` asks for them
        self._process = process
        self._requests, self._replies = process.stdin, process.stdout
        self._killed = False
        self._numbers = count()
        self.used = False  # whether it was asked anything
        self.late = False  # whether the last check missed its deadline,
        self.hung = False  # and nothing but the check itself was the cause
        self.took_s = 0.0  # by the last check that was decided

    @classmethod
    async def spawn(cls, config: VerifyConfig, timeout_s: float) -> Self:
        """Start a worker, with its check imported. Raises ActorLost if it cannot start or is not
        ready in time, ConfigError if its check cannot be used."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command("async_opd.roles.verifier.worker", config),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A process group to kill, and no Ctrl-C meant for the parent.
                start_new_session=True,
                env=environment(config),
            )
        except OSError as error:
            raise ActorLost(f"verifier worker: {error}") from error
        worker = cls(process)
        try:
            async with within(timeout_s):
                refusal = await worker._receive()
        except (TimeoutError, WireError, EOFError) as error:
            cause = await worker._kill_after(error, timeout_s)
            raise ActorLost(f"verifier worker: {cause} while starting") from error
        except asyncio.CancelledError:
            await worker.kill()
            raise
        if refusal:
            await worker.kill()
            raise ConfigError(refusal.decode(errors="replace"))
        return worker

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.returncode is None

    async def ask(self, check: Check, timeout_s: float, within_s: float | None = None) -> Verdict:
        """Ask for a verdict; unknown, and the worker killed, if it is late, dies or sends anything
        else. What it sent is taken, also where the deadline passed while this process stood
        still. A check that ends itself is told to do so `within_s`."""
        self.used = True
        self.late = self.hung = False
        began, cpu_s = time.monotonic(), self._state()[1]
        try:
            verdict = await self._exchange_within(check, within_s or timeout_s, timeout_s)
            self.took_s = time.monotonic() - began
            self.late = verdict is not None and verdict.cause == LATE
            if verdict is None:
                self.late = True
                in_time = self.took_s < (1 + SERVED) * timeout_s  # this process, at its deadline
                self.hung = in_time and self._worked(cpu_s + SERVED * timeout_s)
                raise TimeoutError
            return verdict
        except (
            TimeoutError,
            WireError,
            msgspec.MsgspecError,
            EOFError,
            ConnectionError,
        ) as error:
            return Verdict(id=check.id, reward=None, cause=await self._kill_after(error, timeout_s))

    async def _exchange_within(
        self, check: Check, within_s: float, timeout_s: float
    ) -> Verdict | None:
        """Return its verdict, or None where none came; the pipes are then free again."""
        exchange = asyncio.ensure_future(self._exchange(check, within_s))
        try:
            await asyncio.wait([exchange], timeout=timeout_s)
            return exchange.result() if exchange.done() else None
        finally:
            if not exchange.done():
                exchange.cancel()
                await asyncio.wait([exchange])

    async def _exchange(self, check: Check, within_s: float) -> Verdict:
        """Send the check and receive its verdict. Between them goes a number, and no id."""
        number = f"{next(self._numbers)}"
        sent = Check(id=number, response=sound(check.response), answer=sound(check.answer))
        self._requests.write(frame(msgspec.msgpack.encode((sent, within_s))))
        await self._requests.drain()
        verdict = msgspec.msgpack.decode(await self._receive(), type=Verdict)
        if verdict.id != number:
            raise WireError(f"{check.id}: the reply is for another")
        return msgspec.structs.replace(verdict, id=check.id)

    def _worked(self, until_cpu_s: float) -> bool:
        """Tell whether the worker is neither stopped nor still waiting for a core to run on, having
        had one for less than `until_cpu_s` in all."""
        state, cpu_s = self._state()
        return state == "S" or (state in ("R", "D") and cpu_s >= until_cpu_s)

    def _state(self) -> tuple[str, float]:
        """Return the worker's state as /proc has it, and the time that it had on cores, in s."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text("utf-8", "replace")
        except OSError:  # it is gone
            return "", 0.0
        fields = stat.rpartition(")")[2].split()
        return fields[0], sum(map(int, fields[11:15])) / CLOCK_TICKS

    async def kill(self) -> None:
        """Kill the worker with its process group, and reap it. May be called again."""
        if self.alive:
            self._kill_group()
        with suppress(TimeoutError):
            async with within(REAP_S):
                await self._process.communicate()

    async def _receive(self) -> bytes:
        size = int.from_bytes(await self._replies.readexactly(4), "big")
        if size > MAX_REPLY:
            raise WireError(f"a reply of {size} bytes, more than {MAX_REPLY}")
        return await self._replies.readexactly(size)

    async def _kill_after(self, error: Exception, timeout_s: float) -> str:
        """Kill the worker; say what was wrong with it."""
        if isinstance(error, EOFError | ConnectionError):
            with suppress(TimeoutError):
                async with within(REAP_S):
                    await self._process.wait()
        code = self._process.returncode
        self._kill_group()  # also what a worker that died by itself left running
        await self.kill()
        if isinstance(error, TimeoutError):
            return f"timed out after {float(timeout_s)} s"
        if isinstance(error, EOFError | ConnectionError) and code is not None:
            return f"worker died (signal {-code})" if code < 0 else f"worker died (exit {code})"
        return f"malformed reply ({type(error).__name__})"

    def _kill_group(self) -> None:
        self._killed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
