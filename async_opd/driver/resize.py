"""`async-opd scale`: the size of a running job's pools, and the servers that they ask, changed
through a file in its run directory.

A request is RUN/scale-ID.json, `Changes`; the driver takes it away and leaves its answer in
RUN/scale-ID.answer. A file, not a socket: it needs no port, no secret, and no rights but those to
the directory. What was asked for becomes part of RUN/config.json, with which a restart, or a
resume, begins.
"""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from async_opd.config.load import apply_override, read_run
from async_opd.config.server_rules import url_rules
from async_opd.config.teacher_rules import refuse_broken
from async_opd.core.aio import bounded, together
from async_opd.core.aside import aside
from async_opd.core.errors import ConfigError, TimedOut
from async_opd.core.files import partial, write_file
from async_opd.core.reading import refused
from async_opd.core.run_dir import CONFIG, SCALE_ANSWER, SCALE_REQUEST
from async_opd.core.suggest import either, shown, wrong
from async_opd.core.urls import flaw, normal, shown_url
from async_opd.driver.pools import Pools

POLL_S = 0.5
DISK_S = 30.0  # for each thing that the disk does for a request
LOOK_S = 120.0  # for a look at all the servers that are new


class Changes(Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked of a running job, by pools."""

    sizes: dict[str, int] = {}
    added: dict[str, list[str]] = {}  # addresses of servers
    dropped: dict[str, list[str]] = {}


def parse(words: list[str]) -> Changes:
    """Read changes from words such as `generators=3` and `teacher.urls=+http://b:8000`. Raises
    ConfigError, which shows no secret in an address."""
    changes = Changes()
    for word in words:
        name, _, value = word.partition("=")
        if name.endswith(".urls"):
            pool = name.removesuffix(".urls")
            sign, url = value[:1], value[1:]
            if sign not in ("+", "-"):
                raise ConfigError(
                    f"scale: {name}={shown_url(value)}: write +URL for a server more, -URL for one"
                    " less"
                )
            if wrong_url := flaw(url):
                raise ConfigError(f"scale: {name}={sign}{shown_url(url)}: {wrong_url}")
            among = changes.added if sign == "+" else changes.dropped
            among.setdefault(pool, []).append(normal(url))
        elif re.fullmatch("[1-9][0-9]{0,5}", value):
            changes.sizes[name] = int(value)
        else:
            raise ConfigError(
                f"scale: {shown(word)}: write POOL=NUMBER with a number of at least 1, such as"
                " generators=3, or POOL.urls=+URL, POOL.urls=-URL where it asks servers"
            )
    return changes


def ask(run_dir: Path, changes: Changes, timeout_s: float = 30.0) -> str:
    """Ask the job in `run_dir` for these changes; returns what it answers, behind a look at servers
    that are new. Raises RunMissing, ConfigError for what it refuses, TimedOut when no job
    answers."""
    read_run(run_dir, dict)
    timeout_s += LOOK_S if changes.added else 0.0
    request = run_dir / SCALE_REQUEST.format(uuid.uuid4().hex)
    reply = request.with_suffix(SCALE_ANSWER)
    deadline = time.monotonic() + timeout_s
    with refused(f"scale: {run_dir}"):
        try:
            write_file(request, msgspec.json.encode(changes))
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
        changes = msgspec.json.decode(content, type=Changes)
        servers = _servers(pools, changes)
        _refuse(pools, changes.sizes)
        looks = [_look(pools, name, url) for name, urls in changes.added.items() for url in urls]
        await bounded(together(*looks), LOOK_S, "scale: a look at the servers that are new")
        answer = False, _made(pools, changes.sizes, servers)
        await aside(DISK_S, "scale", _keep, run_dir, changes.sizes, servers)
    except (ConfigError, TimedOut, msgspec.DecodeError) as e:
        answer = True, str(e)
    content = msgspec.json.encode(answer)
    await aside(DISK_S, "scale", write_file, request.with_suffix(SCALE_ANSWER), content)


def _requests(run_dir: Path) -> list[Path]:
    return [*run_dir.glob(SCALE_REQUEST.format("*"))]


def _taken(request: Path) -> bytes:
    content = request.read_bytes()
    request.unlink()
    return content


def _keep(run_dir: Path, sizes: Mapping[str, int], servers: Mapping[str, Sequence[str]]) -> None:
    """Write sizes and servers into the config of the run."""
    tree = {key: value for key, value in read_run(run_dir, dict).items() if value is not None}
    for name, size in sizes.items():
        section = "rollout.generators" if name == "generators" else f"{name}.replicas"
        apply_override(tree, f"{section}={size}")
    for name, urls in servers.items():
        apply_override(tree, f"{name}.urls={json.dumps(urls)}")
    write_file(run_dir / CONFIG, msgspec.json.format(msgspec.json.encode(tree)))


def _refuse(pools: Pools, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for what is no size of a pool that has one."""
    scalable = pools.scalable
    for name, size in sizes.items():
        if name not in scalable:
            raise ConfigError(wrong("scale", name, scalable))
        if scalable[name].urls:
            raise ConfigError(
                f"scale: {name}={size}: has a member for each of its servers: write"
                f" {name}.urls=+URL or {name}.urls=-URL"
            )
        if not 1 <= size < 10**6:
            raise ConfigError(f"scale: {name}={size}: must be at least 1")


def _servers(pools: Pools, changes: Changes) -> dict[str, list[str]]:
    """The servers of each pool that is to have others. Raises ConfigError."""
    scalable = pools.scalable
    servers: dict[str, list[str]] = {}
    for name in [*changes.added, *changes.dropped]:
        asked = scalable[name].urls if name in scalable else []
        if not asked:
            choices = [f"{pool}.urls" for pool in scalable if scalable[pool].urls]
            what = f"scale = '{name}.urls': must be "
            raise ConfigError(what + (either(choices) if choices else "absent: none asks servers"))
        added, dropped = changes.added.get(name, []), changes.dropped.get(name, [])
        for url in dropped:
            if url not in asked:
                raise ConfigError(f"scale: {name}.urls=-{url}: must be {either(asked)}")
        for place, url in enumerate(added):
            if url in asked or url in added[:place]:
                raise ConfigError(f"scale: {name}.urls=+{url}: is there already")
            with_key = pools.scorers[name].key_env is not None
            refuse_broken(url_rules(name, url, with_key=with_key))
        servers[name] = [url for url in asked if url not in dropped] + added
        if not servers[name]:
            raise ConfigError(f"scale: {name}.urls=-{dropped[-1]}: one server must be left")
    return servers


async def _look(pools: Pools, name: str, url: str) -> None:
    """Look at a server that is new. Raises ConfigError."""
    assert pools.look
    await pools.look(name, url)


def _made(pools: Pools, sizes: Mapping[str, int], servers: Mapping[str, list[str]]) -> str:
    """Make the changes; returns them in words."""
    scalable = pools.scalable
    words = [f"{name}: {scalable[name].size} -> {size}" for name, size in sizes.items()]
    for name, urls in servers.items():
        words.append(f"{name}: {' '.join(scalable[name].urls)} -> {' '.join(urls)}")
        scalable[name].ask_servers(urls)
    for name, size in sizes.items():
        scalable[name].resize(size)
    return ", ".join(words)
