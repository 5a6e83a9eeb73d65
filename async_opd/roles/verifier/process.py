"""One worker process as its parent sees it: started, asked, killed."""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import Self

import msgspec

from async_opd.core.aio import within
from async_opd.core.errors import ActorLost, ConfigError, WireError
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.worker import MAX_REPLY, frame

REAP_S = 5.0  # a killed process that takes longer to go is left to the kernel


class WorkerProcess:
    """A worker that said it is ready. Made by `spawn`; of no more use once not `alive`."""

    def __init__(self, process: asyncio.subprocess.Process):
        assert process.stdin and process.stdout  # `spawn` asks for them
        self._process = process
        self._requests, self._replies = process.stdin, process.stdout
        self._killed = False

    @classmethod
    async def spawn(cls, config: VerifyConfig, timeout_s: float) -> Self:
        """Start a worker, with its check imported. Raises ActorLost if it cannot start or is not
        ready in time, ConfigError if its check cannot be used."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "async_opd.roles.verifier.worker",
                str(os.getpid()),
                msgspec.json.encode(config).decode(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A process group to kill, and no Ctrl-C meant for the parent.
                start_new_session=True,
                # Its threads' stacks would count as memory.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
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

    async def ask(self, check: Check, timeout_s: float) -> Verdict:
        """Ask for a verdict; unknown, and the worker killed, if it is late, dies or sends anything
        else."""
        try:
            async with within(timeout_s):
                self._requests.write(frame(msgspec.msgpack.encode(check)))
                await self._requests.drain()
                verdict = msgspec.msgpack.decode(await self._receive(), type=Verdict)
            if verdict.id != check.id:
                raise WireError(f"{check.id}: the reply is for {verdict.id}")
            return verdict
        except (
            TimeoutError,
            WireError,
            msgspec.MsgspecError,
            UnicodeError,
            EOFError,
            ConnectionError,
        ) as error:
            return Verdict(
                id=check.id, correct=None, cause=await self._kill_after(error, timeout_s)
            )

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
