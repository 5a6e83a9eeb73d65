"""One process in namespaces of its own, by the kernel's calls; what `unshare` and `bwrap` do is a
few of them.

User, pid, network, mount, ipc and uts namespaces are made by an ordinary user where the host allows
it, and by root in the same way: root's program runs as `NOBODY`, everyone else's as themselves, and
either is `NOBODY` inside. Nothing of the host is seen but what Python needs, read-only; there is no
/proc, /dev or /etc. Linux 5.14 or newer, which counts the processes of a user in each namespace.
"""

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

NOBODY = 65534
PROGRAM = "/program.py"
PACKAGES = ("site-packages", "dist-packages")  # in the standard library's folder
CLONE_NEW = {
    "mount": 0x20000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "network": 0x40000000,
}
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
MOUNT_SETATTR = 442
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
READ_ONLY = 1 | 2 | 4  # without setuid files and devices too
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_FILTER = 2

# Calls that a program is refused, because no namespace and no limit of a process covers them: they
# hold memory of the kernel, or memory that is mapped nowhere, as much as one likes, reach what is
# not in a namespace, or leave something behind. Of each machine its number for an audit, and in one
# order those of shmget, msgget, semget, mq_open; memfd_create; inotify_init1, fanotify_init;
# userfaultfd; bpf, perf_event_open; socket (a vsock leaves a machine); setsockopt (the size of a
# socket's buffer); syslog (the host's); add_key, request_key, keyctl; io_setup; vmsplice, splice,
# tee; timer_create; and inotify_init, which aarch64 has not.
UNCOVERED = {
    "x86_64": (
        0xC000003E,
        (
            *(29, 68, 64, 240, 319, 294, 300, 323, 321, 298),
            *(41, 54, 103, 248, 249, 250, 206, 278, 275, 276, 222, 253),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(194, 186, 190, 180, 279, 26, 262, 282, 280, 241),
            *(198, 208, 116, 217, 218, 219, 0, 75, 76, 77, 107),
        ),
    ),
}
# io_uring_setup, io_uring_enter, io_uring_register (it makes sockets too); landlock_create_ruleset,
# landlock_add_rule, landlock_restrict_self; memfd_secret. All machines number them alike.
ALIKE = (425, 426, 427, 444, 445, 446, 447)
NEWEST = 462  # mseal, of Linux 6.10: what newer ones do is not known here
X32 = 0x40000000
# By an argument. mmap of what is shared and has no file: it stays as a whole for as long as a page
# of it is mapped. fcntl: locks of ranges of a file, of which there may be any number, and the size
# of a pipe.
MMAP = {"x86_64": 9, "aarch64": 222}
SHARED_ANONYMOUS = 0x21
FCNTL = {"x86_64": 72, "aarch64": 25}
COMMANDS = (6, 7, 37, 38, 1031)  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETPIPE_SZ

# Where a filter reads: the call, the machine, the low half of an argument.
NUMBER, MACHINE = 0, 4
LOAD = 0x20
EQUAL = 0x15
AT_LEAST = 0x35
AND = 0x54
RETURN = 0x06
ALLOW = 0x7FFF0000
KILL = 0x80000000
REFUSE = 0x50000  # and an error's number
EPERM, ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: int | bytes | None) -> None:
    words = (ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args)
    if getattr(_libc, name)(*words) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def leave() -> None:
    """Goes into new namespaces. This process stays outside its pid namespace, its next child is the
    first in it."""
    if os.geteuid() == 0:
        os.setgroups([])
    _call("unshare", sum(CLONE_NEW.values()))


def map_users(pid: int) -> None:
    """Gives the user namespace of `pid`, which has just left, its one user; root in it too, if this
    process is."""
    for kind, host_id in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            lines = f"0 0 1\n{NOBODY} {NOBODY} 1"
        else:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
            lines = f"{NOBODY} {host_id} 1"
        Path(f"/proc/{pid}/{kind}_map").write_text(lines)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the thread that started it ends, until the user
    changes; exits if that happened already."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent of this process is gone")


def furnish(program: str, megabytes: int, shown: Iterable[Path]) -> None:
    """Makes a root of its own: the files, folders and links of `shown`, the file PROGRAM, and /tmp,
    of that size, the one place to write."""
    size = f"size={megabytes}m,nr_inodes=1024".encode()
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size + b",mode=755")
    os.mkdir("/tmp/host")
    os.mkdir("/tmp/box")
    _call("pivot_root", b"/tmp", b"/tmp/host")
    os.chdir("/")
    for path in shown:
        _show(path)
    Path(f"/box{PROGRAM}").write_text(program, encoding="utf-8", errors="surrogatepass")
    os.mkdir("/box/tmp")
    _call("umount2", b"/host", MNT_DETACH)
    _call(
        "syscall",
        MOUNT_SETATTR,
        AT_FDCWD,
        b"/",
        AT_RECURSIVE,
        struct.pack("4Q", READ_ONLY, 0, 0, 0),
        32,
    )
    _call("mount", b"tmpfs", b"/box/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size + b",mode=1777")
    # Who is in a chroot gets no user namespace, where it would have capabilities again.
    os.chroot("/box")
    os.chdir("/tmp")


def _show(path: Path) -> None:
    """Shows a file, a link or a folder where it lies; of a folder, not the packages in it."""
    source, target = Path(f"/host{path}"), Path(f"/box{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
        return
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    _call("mount", bytes(source), bytes(target), None, MS_BIND | MS_REC, None)
    for packages in PACKAGES:
        if (target / packages).is_dir():
            _call("mount", b"none", bytes(target / packages), b"tmpfs", 0, b"size=0,nr_inodes=1")


def become_nobody() -> None:
    """Gives up the user, and the capabilities with the next exec; others of that user cannot look
    into this process."""
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def gain_nothing() -> None:
    """Lets no file that this process executes give it another user or capabilities."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def refuse_uncovered_calls() -> None:
    """Answers the calls of UNCOVERED and their like with EPERM from here on, newer ones with
    ENOSYS, and kills for those of another machine's numbering."""
    name = os.uname().machine
    if name not in UNCOVERED:
        raise OSError(0, f"its machine is {name}, and must be {' or '.join(UNCOVERED)}")
    lines = [struct.pack("HBBI", *line) for line in _filter(name)]
    code = ctypes.create_string_buffer(b"".join(lines))
    filter_ = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, filter_, 0, 0)


def _filter(name: str) -> Iterator[tuple[int, int, int, int]]:
    """Writes the filter: operation, lines to pass over if so, if not so, and its operand."""
    machine, calls = UNCOVERED[name]
    yield LOAD, 0, 0, MACHINE
    yield EQUAL, 1, 0, machine
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, NUMBER
    yield AT_LEAST, 0, 1, X32
    yield RETURN, 0, 0, REFUSE + EPERM
    yield AT_LEAST, 0, 1, NEWEST + 1
    yield RETURN, 0, 0, REFUSE + ENOSYS
    for number in (*calls, *ALIKE):
        yield EQUAL, 0, 1, number
        yield RETURN, 0, 0, REFUSE + EPERM
    yield EQUAL, 0, 5, MMAP[name]
    yield LOAD, 0, 0, _argument(3)
    yield AND, 0, 0, SHARED_ANONYMOUS
    yield EQUAL, 0, 1, SHARED_ANONYMOUS
    yield RETURN, 0, 0, REFUSE + EPERM
    yield RETURN, 0, 0, ALLOW
    yield EQUAL, 0, 2 * len(COMMANDS) + 1, FCNTL[name]
    yield LOAD, 0, 0, _argument(1)
    for command in COMMANDS:
        yield EQUAL, 0, 1, command
        yield RETURN, 0, 0, REFUSE + EPERM
    yield RETURN, 0, 0, ALLOW


def _argument(index: int) -> int:
    return 16 + 8 * index
