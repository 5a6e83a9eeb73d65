"""Whether references can be used, asked of the check itself before anything is sampled.

Run as `python -m async_opd.roles.verifier.references <parent pid> <VerifyConfig in JSON>` it is the
process that asks: of each reference that comes in a frame on its stdin it says in a frame on stdout
what is wrong, "" for nothing. One that takes too long, or kills the process, cannot be used either.
Its first frame is KNOWS, "" of a check that says nothing of them, or why it cannot be loaded.
"""

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from async_opd.core.errors import AsyncOpdError, ConfigError, DataError, first_line
from async_opd.core.foreign import foreign
from async_opd.roles.verifier import checks
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.process import command, environment
from async_opd.roles.verifier.worker import MAX_REPLY, begin, frame

START_S = 60.0  # for a process to import its check
LOOK_S = 0.2  # between two looks whether to stop
KNOWS = "knows"  # what the process says first where the check can tell of a reference
BATCH = 32  # references on the way to a process: what it says of them fits a pipe


@dataclass(frozen=True)
class References:
    """Asks the check of `config`."""

    config: VerifyConfig

    @property
    def key(self) -> str:
        """Say by what they are judged: the check, and its source."""
        module, colon, _ = self.config.check.partition(":")
        sources = sorted(Path(__file__).parent.rglob("*.py"))  # a check of ours reads by others
        with suppress(ImportError, ValueError):
            if colon and (spec := find_spec(module)) and spec.origin:
                sources = [Path(spec.origin)]
        return " ".join([f"{self.config}", *(path.read_text("utf-8") for path in sources)])

    def unusable(self, answers: Sequence[str], stop: threading.Event) -> dict[str, str]:
        """Say of those of `answers` that cannot be used why, on every core, until `stop` is set.
        Raises ConfigError where the check cannot be loaded."""
        different = list(dict.fromkeys(answers))
        cores = min(len(os.sched_getaffinity(0)), -(-len(different) // BATCH))
        with ThreadPoolExecutor(max(1, cores)) as threads:
            shares = [different[i::cores] for i in range(cores)]
            judged = threads.map(lambda share: _asked(self.config, share, stop), shares)
            return {answer: why for share in judged for answer, why in share.items()}


def _asked(config: VerifyConfig, answers: Sequence[str], stop: threading.Event) -> dict[str, str]:
    """Ask one process after another: each reference that costs one is left to none. Raises
    ConfigError where the check cannot be loaded."""
    wrong: dict[str, str] = {}
    left = [*answers]
    while left and not stop.is_set():
        with _Asker(config, stop) as asker:
            if asker.refusal:
                raise ConfigError(asker.refusal)
            if not asker.knows:
                return {}
            while left and not asker.cause and not stop.is_set():
                whys = asker.ask(left[:BATCH])
                wrong |= {answer: why for answer, why in zip(left, whys, strict=False) if why}
                left = left[len(whys) :]
            if asker.cause:
                wrong[left.pop(0)] = asker.cause
    return wrong


class _Asker:
    """One process that asks."""

    def __init__(self, config: VerifyConfig, stop: threading.Event):
        """Start it. It answers nothing more once `stop` is set."""
        self._stop = stop
        self._timeout_s = config.timeout_s
        self.cause = ""  # why it did not answer
        self._pending = b""
        self._process = subprocess.Popen(
            command(__name__, config),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # no Ctrl-C meant for the parent
            env=environment(config),
        )
        reply = self._read(START_S, "while it is loaded")
        self.knows = reply == KNOWS  # False: the check has nothing to say of a reference
        # why the check cannot be loaded
        self.refusal = None if self.knows else reply
        if self.cause:
            self.refusal = f"verify.check = {config.check!r}: {self.cause}"

    def __enter__(self) -> "_Asker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        with self._process:  # waits, and closes the pipes
            pass

    def ask(self, answers: Sequence[str]) -> list[str]:
        """Say what is wrong of each; of fewer where one takes too long or ends the process."""
        assert self._process.stdin
        texts = [answer.encode(errors="replace") for answer in answers]
        sent = b"".join(map(frame, texts))
        writing = threading.Thread(target=self._write, args=(sent,), daemon=True)
        writing.start()
        whys: list[str] = []
        for _ in texts:
            why = self._read(self._timeout_s)
            if why is None:
                return whys
            whys.append(why)
        return whys

    def _write(self, data: bytes) -> None:
        assert self._process.stdin
        with suppress(OSError):  # it died, which the reader sees
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _read(self, timeout_s: float, doing: str = "at this reference") -> str | None:
        """Read a frame; None, and `cause`, where none comes."""
        assert self._process.stdout
        pipe, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while (size := _size(self._pending)) is None or len(self._pending) < 4 + size:
            if self._stop.is_set():
                return None
            if time.monotonic() > until:
                self.cause = f"the check takes more than {timeout_s:g} s {doing}"
                return None
            if not select.select([pipe], [], [], LOOK_S)[0]:
                continue
            data = os.read(pipe, 1 << 16)
            if not data:
                self.cause = f"the check's process dies {doing}"
                return None
            self._pending += data
        body, self._pending = self._pending[4 : 4 + size], self._pending[4 + size :]
        return body.decode(errors="replace")


def _size(data: bytes) -> int | None:
    return int.from_bytes(data[:4], "big") if len(data) >= 4 else None


def main(parent: int, config: VerifyConfig) -> None:
    """Say of each reference what is wrong, until stdin ends."""
    requests, replies = begin(parent, int(config.memory_gib * 2**30))
    try:
        with foreign(f"verify.check = {config.check!r}", ConfigError):
            reference = checks.reference(config)
        opening = KNOWS if reference else ""
    except AsyncOpdError as error:
        reference, opening = None, f"{error}"
    replies.write(frame(opening.encode(errors="replace")[:MAX_REPLY]))
    while reference and (header := requests.read(4)):
        answer = requests.read(int.from_bytes(header, "big")).decode(errors="replace")
        why = ""
        try:
            with foreign("the check"):
                reference(answer)
        except DataError as error:
            why = first_line(error)
        replies.write(frame(why.encode(errors="replace")[:MAX_REPLY]))


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=VerifyConfig))
