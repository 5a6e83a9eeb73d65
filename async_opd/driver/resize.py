"""`async-opd scale`: the size of a running job's pools, asked for through a file in its run
directory.

A request is RUN/scale-ID.json, {"generators": 3, "teachers.math": 2}; the driver takes it away and
leaves its answer in RUN/scale-ID.answer. A file, not a socket: it needs no port, no secret, and no
rights but those to the directory. What was asked for becomes part of RUN/config.json, with which a
restart, or a resume, begins.
"""

import asyncio
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec

from async_opd.config.load import apply_override, read_run
from async_opd.core.aside import aside
from async_opd.core.errors import ConfigError, TimedOut
from async_opd.core.files import partial, write_file
from async_opd.core.reading import refused
from async_opd.core.run_dir import CONFIG, SCALE_ANSWER, SCALE_REQUEST
from async_opd.core.suggest import wrong
from async_opd.driver.pools import Pools

POLL_S = 0.5
DISK_S = 30.0  # for each thing that the disk does for a request


def parse(words: list[str]) -> dict[str, int]:
    """Read pool sizes from words such as `generators=3`. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for word in words:
        name, _, size = word.partition("=")
        if not re.fullmatch("[1-9][0-9]{0,5}", size):
            raise ConfigError(
                f"scale: {word!r}: write POOL=NUMBER with a number of at least 1, such as"
                " generators=3"
            )
        sizes[name] = int(size)
    return sizes


def ask(run_dir: Path, sizes: dict[str, int], timeout_s: float = 30.0) -> str:
    """Ask the job in `run_dir` for these sizes; returns what it answers. Raises RunMissing,
    ConfigError for what it refuses, TimedOut when no job answers."""
    read_run(run_dir, dict)
    request = run_dir / SCALE_REQUEST.format(uuid.uuid4().hex)
    reply = request.with_suffix(SCALE_ANSWER)
    deadline = time.monotonic() + timeout_s
    with refused(f"scale: {run_dir}"):
        try:
            write_file(request, msgspec.json.encode(sizes))
            while not reply.exists():
                if time.monotonic() > deadline:
                    raise TimedOut(
                        f"scale: no answer in {timeout_s:g} s: no job is training in {run_dir}"
                    )
                time.sleep(POLL_S / 5)
            no, answer = msgspec.json.decode(reply.read_bytes(), type=tuple[bool, str])
        finally:  # whoever asked may have had enough of waiting
            for left in (request, partial(request), reply):
                with suppress(OSError):
                    left.unlink()
    if no:
        raise ConfigError(answer)
    return answer


async def serve(run_dir: Path, pools: Pools) -> None:
    """Answer requests for ever; waits `POLL_S` between two looks."""
    while True:
        requests: list[Path] = []
        with suppress(OSError, TimedOut):
            requests = await aside(DISK_S, "scale", _requests, run_dir)
        for request in requests:
            # who asked may have gone, or may not be allowed to
            with suppress(OSError, TimedOut):
                await _answer(run_dir, request, pools)
        await asyncio.sleep(POLL_S)


async def _answer(run_dir: Path, request: Path, pools: Pools) -> None:
    content = await aside(DISK_S, "scale", _taken, request)
    try:
        sizes = msgspec.json.decode(content, type=dict[str, int])
        answer = False, _resize(pools, sizes)
        await aside(DISK_S, "scale", _keep, run_dir, sizes)
    except (ConfigError, msgspec.DecodeError) as e:
        answer = True, str(e)
    content = msgspec.json.encode(answer)
    await aside(DISK_S, "scale", write_file, request.with_suffix(SCALE_ANSWER), content)


def _requests(run_dir: Path) -> list[Path]:
    return [*run_dir.glob(SCALE_REQUEST.format("*"))]


def _taken(request: Path) -> bytes:
    content = request.read_bytes()
    request.unlink()
    return content


def _keep(run_dir: Path, sizes: dict[str, int]) -> None:
    """Write the sizes into the config of the run."""
    tree = {key: value for key, value in read_run(run_dir, dict).items() if value is not None}
    for name, size in sizes.items():
        section = "rollout.generators" if name == "generators" else f"{name}.replicas"
        apply_override(tree, f"{section}={size}")
    write_file(run_dir / CONFIG, msgspec.json.format(msgspec.json.encode(tree)))


def _resize(pools: Pools, sizes: dict[str, int]) -> str:
    scalable = pools.scalable
    for name, size in sizes.items():
        if name not in scalable:
            raise ConfigError(wrong("scale", name, scalable))
        if not 1 <= size < 10**6:
            raise ConfigError(f"scale: {name}={size}: must be at least 1")
    changes = ", ".join(f"{name}: {scalable[name].size} -> {size}" for name, size in sizes.items())
    for name, size in sizes.items():
        scalable[name].resize(size)
    return changes
