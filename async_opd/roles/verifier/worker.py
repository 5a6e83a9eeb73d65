"""A verifier's child process: `python -m async_opd.roles.verifier.worker <parent pid> <VerifyConfig
in JSON>`.

Frames on its stdin and stdout are a 4-byte big-endian length, then msgpack. It sends one empty
frame once its check is imported, or one with the text that says why it cannot be used, then one
`Verdict` for each `Check` and the seconds that it has. It ends when stdin ends, or with its parent,
even inside a C loop.
"""

import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec

from async_opd.core.errors import AsyncOpdError, ConfigError, first_line
from async_opd.core.foreign import foreign
from async_opd.core.wire import Check, Verdict
from async_opd.roles.verifier.checks import Decide, Late, bounded, load
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.sandbox.namespaces import die_with

MAX_REPLY = 4096  # bytes
MAX_REQUEST = 64 << 20
RAISED = "check raised "  # how a cause begins
LATE = "late"  # the cause of a check that ended itself
LONGEST = 500  # characters of an answer, or of a cause, that is passed on


class Raised(AsyncOpdError):
    """An error of a check, which is its cause."""


def main(parent: int, config: VerifyConfig) -> None:
    """Answer requests until stdin ends."""
    limit = int(config.memory_gib * 2**30)
    requests, replies = begin(parent, limit)
    try:
        decide, ends_itself = load(config), bounded(config.check)
    except ConfigError as error:
        replies.write(frame(f"{error}".encode(errors="replace")[:MAX_REPLY]))
        return
    enforce_memory_limit(limit)
    replies.write(frame(b""))
    while header := requests.read(4):
        size = int.from_bytes(header, "big")
        if size > MAX_REQUEST:
            sys.exit(f"a request of {size} bytes, more than {MAX_REQUEST}")
        check, within_s = msgspec.msgpack.decode(requests.read(size), type=tuple[Check, float])
        verdict = run_check(check, partial(decide, within_s=within_s) if ends_itself else decide)
        enforce_memory_limit(limit)
        replies.write(frame(msgspec.msgpack.encode(verdict)))


def run_check(check: Check, decide: Decide) -> Verdict:
    """Decide `check`: unknown where that raises, whatever it is that foreign code raises."""
    try:
        with foreign("check", Raised):
            decision = decide(check.response, check.answer)
    except AsyncOpdError as error:
        if isinstance(error.__cause__, Late):
            return Verdict(id=check.id, reward=None, cause=LATE)
        kind = type(error.__cause__ if isinstance(error, Raised) else error).__name__
        why = "" if isinstance(error, Raised) else f": {first_line(error)}"
        cause = sound(f"{RAISED}{kind}{why}"[:LONGEST])
        return Verdict(id=check.id, reward=None, cause=cause)
    reward, answer = decision if isinstance(decision, tuple) else (decision, None)
    return Verdict(
        id=check.id,
        reward=float(reward),
        answer=answer if answer is None or len(answer) <= LONGEST else "",
    )


def sound(text: str) -> str:
    """Put "?" for what no encoding has, halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def frame(body: bytes) -> bytes:
    """Put its length before `body`."""
    return len(body).to_bytes(4, "big") + body


def begin(parent: int, limit: int) -> tuple[BinaryIO, BinaryIO]:
    """End with the parent, hold this process to an address space of `limit` bytes, and take the
    pipes of requests and of replies."""
    die_with(parent)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return take_pipes()


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the protocol's two pipes out of reach of a check, which reads nothing and prints to
    stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


def enforce_memory_limit(limit: int) -> None:
    """Exit once this process has ever mapped more than half of `limit` bytes.

    Sympy swallows MemoryError and carries on with "not equal", for this check and, its caches full,
    for later ones.
    """
    peak = int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0]) * 1024
    if peak > limit / 2:
        sys.exit(
            f"a check mapped {peak / 2**30:.2f} GiB, more than half of the limit of"
            f" {limit / 2**30:.2f} GiB"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=VerifyConfig))
