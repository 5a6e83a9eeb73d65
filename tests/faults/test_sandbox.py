"""What a hostile program can do in the `code` check: a verdict in time, nothing of it remains, the
pool goes on.

Each program prints "ok", the right answer, only if its attack went through (but for those said to
do no harm).
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import sysconfig
from contextlib import suppress

import psutil
import pytest

from async_opd.core.errors import ConfigError
from async_opd.roles.verifier.sandbox.program import PROCESSES, probe
from tests.processes import command_line
from tests.roles.verifier.conftest import runs, until

try:
    probe(isolated=True, memory=512 << 20)
    refused = ""
except ConfigError as error:
    refused = str(error)
needs_namespaces = pytest.mark.skipif(bool(refused), reason=refused)

TESTS = json.dumps({"inputs": [""], "outputs": ["ok"]})
OURS = 2  # processes of the sandbox itself
HARMLESS = "print('ok')"


@pytest.fixture
async def run(start_pool, check, workers):
    """Has programs checked side by side, a worker each, and returns whether each is right. Their
    verdicts come in time; then nothing of them is there, and the same workers decide the next
    ones."""

    async def decide(*programs: str, timeout_s: float = 30.0, **settings) -> list[bool]:
        pool = await start_pool(
            check="code", timeout_s=timeout_s, workers=len(programs), **settings
        )
        before = workers()
        verdicts = await asyncio.gather(
            *(pool.check(check(program, TESTS)) for program in programs)
        )
        assert {verdict.cause for verdict in verdicts} == {""}
        await until(lambda: not any(worker.children(recursive=True) for worker in before))
        again = await asyncio.gather(*(pool.check(check(HARMLESS, TESTS)) for _ in programs))
        assert {verdict.correct for verdict in again} == {True}
        assert workers() == before
        await pool.close()
        return [verdict.correct for verdict in verdicts]

    return decide


@needs_namespaces
async def test_a_fork_bomb_stays_small_and_ends(run, workers):
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    most = 0

    async def watch():
        nonlocal most
        while True:
            with suppress(psutil.NoSuchProcess):
                most = max(
                    most, len([child for w in workers() for child in w.children(recursive=True)])
                )
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    assert await run(bomb, timeout_s=2.0) == [False]
    watching.cancel()
    assert PROCESSES <= most <= PROCESSES + OURS


BEYOND_A_LIMIT = {
    "memory": "kept = []\nwhile True: kept.append(bytearray(1 << 20))",
    "output": "while True: print('x' * 1000)",
    "errors": "import os\nwhile True: os.write(2, b'x' * 1000)",
    "sleep": "import time\ntime.sleep(3600)",
    "loop": "while True: pass",
    "no output": "import sys\nsys.stdout.close()\nimport time\ntime.sleep(3600)",
    "exit": "import os\nos.close(1)\nos._exit(0)",
    "limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))\nprint('ok')"
    ),
}


@needs_namespaces
async def test_a_limit_hit_is_wrong(run):
    right = await run(*BEYOND_A_LIMIT.values(), timeout_s=2.5)
    assert [name for name, correct in zip(BEYOND_A_LIMIT, right, strict=True) if correct] == []


@needs_namespaces
async def test_all_memory_of_a_program_is_bounded(run, workers):
    greedy = (
        "import mmap, os, time\nos.fork(); os.fork()\nkept = []\nfor path in range(64):\n    try:\n"
        "        with open(f'{os.getpid()}-{path}', 'wb') as file: file.write(bytes(8 << 20))\n   "
        " except OSError: pass\ntry:\n    while True:\n        kept.append(bytearray(1 <<"
        " 20))\nexcept MemoryError:\n    time.sleep(3600)"
    )
    most = 0

    async def watch():
        nonlocal most
        while True:
            with suppress(psutil.NoSuchProcess):
                of_program = [
                    c
                    for w in workers()
                    for c in w.children(recursive=True)
                    if "/program.py" in command_line(c)
                ]
                most = max(most, sum(process.memory_info().rss for process in of_program))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    assert await run(greedy, timeout_s=2.0, memory_gib=0.5) == [False]
    watching.cancel()
    assert 100 << 20 < most < 512 << 20


@needs_namespaces
async def test_files_are_bounded_one_by_one_and_together(run):
    one = "import os\nfor _ in range(9): os.write(fd, bytes(1 << 20))\nprint('ok')"
    many = (
        "for n in range(20):\n    with open(str(n), 'wb') as file: file.write(bytes(1 <<"
        " 20))\nprint('ok')"
    )
    one = f"import os\nfd = os.open('big', os.O_CREAT | os.O_WRONLY)\n{one}"
    empty = "for n in range(2000): open(str(n), 'w').close()\nprint('ok')"
    assert await run(one, many, empty) == [False] * 3


@needs_namespaces
async def test_nothing_outside_its_directory_is_written(run, tmp_path):
    tmp_path.joinpath("kept").write_text("kept")
    paths = [
        str(tmp_path / "kept"),
        str(tmp_path / "new"),
        "/tmp/../new",
        "/usr/new",
        f"{sys.base_prefix}/new",
        "/new",
    ]
    write = f"""
for path in {paths}:
    try:
        with open(path, 'a') as file: file.write('x')
        print('ok')
        break
    except OSError: pass
"""
    tmp_path.chmod(0o777)
    tmp_path.joinpath("kept").chmod(0o666)
    assert await run(write) == [False]
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert tmp_path.joinpath("kept").read_text() == "kept"


@needs_namespaces
async def test_the_network_is_out_of_reach(run):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        server.setblocking(False)
        hidden.bind("\0async-opd-test")
        hidden.listen()
        hidden.setblocking(False)
        connect = f"""
import socket
for family, address in (
    (socket.AF_INET, {server.getsockname()}),
    (socket.AF_UNIX, chr(0) + 'async-opd-test'),
    (socket.AF_INET, ('1.1.1.1', 53)),
    (socket.AF_VSOCK, (2, 1)),
):
    try:
        socket.socket(family).connect(address)
        print('ok')
        break
    except OSError: pass
"""
        assert await run(connect) == [False]
        for listener in (server, hidden):
            with pytest.raises(BlockingIOError):
                listener.accept()


@needs_namespaces
async def test_it_shares_no_namespace_with_the_host(start_pool, check, workers):
    """Each is a layer of its own: refused calls alone would hide that the network is shared."""
    pool = await start_pool(check="code")
    pending = asyncio.create_task(pool.check(check("import time\ntime.sleep(3600)", TESTS)))
    (worker,) = workers()
    inside = []

    def found() -> list:
        inside[:] = [
            child
            for child in worker.children(recursive=True)
            if "/program.py" in command_line(child)
        ]
        return inside

    await until(found)
    kinds = ("ipc", "mnt", "net", "pid", "user", "uts")
    of_host = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}
    of_program = {kind: os.readlink(f"/proc/{inside[0].pid}/ns/{kind}") for kind in kinds}
    assert [kind for kind in kinds if of_program[kind] == of_host[kind]] == []
    worker.kill()
    assert (await pending).correct is None


@needs_namespaces
async def test_no_secret_of_the_host_is_read(run, monkeypatch, tmp_path):
    monkeypatch.setenv("ASYNC_OPD_SECRET", "hunter2")
    tmp_path.joinpath("secret").write_text("hunter2")
    look = f"""
import os
found = [*(set(os.environ) - {{'LC_CTYPE'}})]
secret = {str(tmp_path / "secret")!r}
for path in ('/etc/shadow', '/proc/self/environ', '/proc/1/environ', '/dev/mem', secret):
    try: found.append(open(path, 'rb').read())
    except OSError: pass
for fd in range(3, 1024):
    try: found.append(os.fstat(fd))
    except OSError: pass
if found: print('ok')
"""
    assert await run(look) == [False]


@needs_namespaces
async def test_no_privilege_is_gained(run):
    climb = """
import ctypes, os
libc = ctypes.CDLL(None)
tries = [
    lambda: libc.unshare(0x10000000), lambda: libc.unshare(0x20000), lambda: libc.chroot(b'.'),
    lambda: libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), lambda: libc.umount2(b'/tmp', 2),
    lambda: libc.setuid(0), lambda: libc.ptrace(16, 1, 0, 0),
    lambda: libc.shmget(0, 1 << 30, 0o1777), lambda: libc.memfd_create(b'x', 0),
    lambda: libc.sethostname(b'x', 1),
]
if any(attempt() != -1 for attempt in tries): print('ok')
"""
    with_ctypes = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import ctypes"], capture_output=True
    )
    if with_ctypes.returncode:
        climb = climb.replace("import ctypes, os\nlibc = ctypes.CDLL(None)", "raise SystemExit")
    assert await run(climb) == [False]


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == 'x86_64'
def call(x86_64, aarch64, *args):
    return libc.syscall(x86_64 if x86 else aarch64, *args)
"""
HOLDS_MEMORY = {
    "semaphores": "ok = call(64, 190, 0, 32000, 0o1777) >= 0",
    "messages": "ok = call(68, 186, 0, 0o1777) >= 0",
    "shared memory": "ok = call(29, 194, 0, 1 << 20, 0o1777) >= 0",
    "POSIX messages": "ok = call(240, 180, b'q', os.O_CREAT | os.O_RDWR, 0o600, None) >= 0",
    "userfaultfd": "ok = call(323, 282, 1) >= 0",
    "inotify": "ok = call(294, 26, 0) >= 0 or (x86 and call(253, 0) >= 0)",
    "fanotify": "ok = call(300, 262, 0x200, 0) >= 0",
    "memfd": "ok = call(319, 279, b'x', 0) >= 0",
    "bpf": "ok = call(321, 280, 0, 0, 0) == 0 or ctypes.get_errno() != 1",
    "perf": "ok = call(298, 241, 0, 0, 0, 0, 0) == 0 or ctypes.get_errno() != 1",
    "io_setup": "context = ctypes.c_ulong()\nok = call(206, 0, 1, ctypes.byref(context)) == 0",
    "buffers of sockets": (
        "import socket\ntry: socket.socketpair()[0].setsockopt(1, 7, 1 << 30)\nexcept OSError: ok ="
        " False\nelse: ok = True"
    ),
    "the host's log": "ok = call(103, 116, 10, 0, 0) >= 0 or ctypes.get_errno() != 1",
    "landlock": "ok = call(444, 444, None, 0, 1) >= 0",
    "keys": "ok = call(248, 217, b'user', b'x', b'y', 1, -3) >= 0",
    "timers": ("id = ctypes.c_int()\nok = call(222, 107, 1, None, ctypes.byref(id)) == 0"),
    "calls that are not known yet": "ok = call(463, 463) >= 0 or ctypes.get_errno() != 38",
    "pages that stay behind what is mapped": (
        "import mmap\ntry: mmap.mmap(-1, 1 << 20)\nexcept OSError: ok = False\nelse: ok = True"
    ),
    "pages in pipes": "ok = call(278, 75, 1, None, 0, 0) != -1 or ctypes.get_errno() != 1",
    "pipes": (
        "import fcntl\ntry: fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)\nexcept OSError: ok ="
        " False\nelse: ok = True"
    ),
    "locks": (
        "import fcntl\ntry: fcntl.lockf(open('x', 'w'), fcntl.LOCK_EX)\nexcept OSError: ok ="
        " False\nelse: ok = True"
    ),
}


@needs_namespaces
async def test_no_call_holds_memory_past_the_limit(start_pool, check):
    pool = await start_pool(check="code")
    programs = [f"{CALLS}\n{attack}\nif ok: print('ok')" for attack in HOLDS_MEMORY.values()]
    verdicts = [await pool.check(check(program, TESTS)) for program in programs]
    right = [verdict.correct for verdict in verdicts]
    assert [name for name, correct in zip(HOLDS_MEMORY, right, strict=True) if correct] == []


IMPORTS = """
import importlib, sys
left = {'antigravity', 'this', 'idlelib', 'test'}
def found(name):
    try: return bool(importlib.import_module(name))
    except BaseException: return False
print(*[name for name in sorted(sys.stdlib_module_names - left) if found(name)])
"""
WORKS = """
import asyncio, locale, os, shutil, sqlite3, subprocess, tempfile, threading, zoneinfo
asyncio.run(asyncio.sleep(0.01))
thread = threading.Thread(target=print)
thread.start(); thread.join()
open('a', 'w').write('x'); shutil.copy('a', 'b')
with tempfile.TemporaryFile() as file: file.write(b'x')
sqlite3.connect(':memory:').execute('create table t (x)')
zoneinfo.ZoneInfo('UTC')
print('ok')
"""


@needs_namespaces
async def test_of_usr_it_sees_what_python_needs(start_pool, check):
    plain = [sys.executable, "-I", "-S", "-c", IMPORTS]
    wanted = subprocess.check_output(plain, text=True, stderr=subprocess.DEVNULL)
    hidden = "import os\nshown = [p for p in {} if os.path.exists(p)]\nif not shown: print('ok')"
    paths = [
        "/usr/src",
        "/usr/local/src",
        "/usr/share/doc",
        "/usr/bin/env",
        "/usr/include",
        __file__,
    ]
    packages = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    empty = f"""
import os
if not os.path.isdir({packages!r}) or not os.listdir({packages!r}): print('ok')
"""
    pool = await start_pool(check="code")
    for program in (hidden.format(paths), empty, WORKS):
        assert (await pool.check(check(program, TESTS))).correct is True, program
    imports = json.dumps({"inputs": [""], "outputs": [wanted]})
    assert (await pool.check(check(IMPORTS, imports))).correct is True


@needs_namespaces
async def test_it_cannot_kill_what_it_came_from(run):
    kill = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for pid in (os.getppid(), 1, 0, -1):
    for number in (signal.SIGSTOP, signal.SIGKILL) if pid > 0 else (signal.SIGTERM,):
        try: os.kill(pid, number)
        except OSError: pass
print('ok')
"""
    assert await run(kill) == [True]  # and did no harm: the worker is the same, and goes on


@needs_namespaces
async def test_a_daemon_left_behind_is_gone(run):
    mark = f"async-opd-daemon-{os.getpid()}"
    leave = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(3600)', {mark!r}])
    os._exit(0)
time.sleep(0.3)
print('ok')
"""
    assert await run(leave) == [True]  # as a program it did what it should
    assert [
        process
        for process in psutil.process_iter(["cmdline"])
        if mark in (process.info["cmdline"] or [])
    ] == []


@needs_namespaces
async def test_a_worker_killed_in_the_middle_leaves_no_program(start_pool, check, workers):
    pool = await start_pool(check="code")
    pending = asyncio.create_task(pool.check(check("import time\ntime.sleep(3600)", TESTS)))
    (worker,) = workers()
    await until(
        lambda: [
            child
            for child in worker.children(recursive=True)
            if "/program.py" in command_line(child)
        ]
    )
    inside = worker.children(recursive=True)
    assert len(inside) == OURS + 1
    worker.kill()
    assert (await pending).correct is None
    await until(lambda: not any(map(runs, inside)))
    assert (await pool.check(check(HARMLESS, TESTS))).correct is True


async def test_without_namespaces_the_limits_stay(run):
    memory, sleep = (BEYOND_A_LIMIT[name] for name in ("memory", "sleep"))
    file = "import os\nos.write(os.open('x', 65), bytes(9 << 20)) == 9 << 20 and print('ok')"
    assert await run(memory, sleep, file, timeout_s=2.0, sandbox="none") == [False] * 3


async def test_without_namespaces_its_environment_is_empty_and_its_directory_goes(
    run, monkeypatch, tmp_path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    look = "import os\nopen('x', 'w').close()\nif not set(os.environ) - {'LC_CTYPE'}: print('ok')"
    assert await run(look, sandbox="none") == [True]
    assert list(tmp_path.iterdir()) == []


REFUSED = """
import asyncio, sys
from async_opd.core.errors import ConfigError
from async_opd.roles.verifier.sandbox import namespaces
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool

namespaces.UNCOVERED = {"x86_64": (0xC000003E, (272,)), "aarch64": (0xC00000B7, (97,))}  # unshare
namespaces.gain_nothing()
namespaces.refuse_uncovered_calls()

async def main():
    for check, sandbox in (("math", "namespaces"), ("code", "none"), ("code", "namespaces")):
        pool = VerifierPool(VerifyConfig(check=check, sandbox=sandbox))
        try:
            await pool.start()
            await pool.close()
            print("started")
        except ConfigError as error:
            print(error)

asyncio.run(main())
"""


def test_a_host_without_namespaces_is_refused_at_start_by_name_and_only_where_they_are_needed():
    said = subprocess.check_output([sys.executable, "-c", REFUSED], text=True).splitlines()
    assert said[:2] == ["started", "started"]
    assert (
        "verify.check = 'code': this host does not allow its sandbox ([Errno 1] unshare: Operation"
        " not permitted)" in said[2]
    )
    assert "verify.sandbox = 'none'" in said[2]
