"""One process in namespaces of its own, by the kernel's calls; what `unshare` and `bwrap` do is a
few of them.

User, pid, network, mount, ipc and uts namespaces are made by an ordinary user where the host allows
it, and by root in the same way: root's program runs as `NOBODY`, everyone else's as themselves, and
either is `NOBODY` inside. Nothing of the host is seen but what `interpreter` lists, read-only; there
is no /proc, /dev or /etc. Linux 5.14 or newer, which counts the processes of a user in each
namespace.
"""

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable
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
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_FILTER = 2
# What no namespace or limit of a process covers: shmget, msgget, memfd_create, memfd_secret; socket
# (a vsock leaves a virtual machine), io_uring_setup (it makes sockets too), add_key, request_key,
# keyctl. Machine: (audit number, calls).
UNCOVERED = {
    "x86_64": (0xC000003E, (29, 68, 319, 447, 41, 425, 248, 249, 250)),
    "aarch64": (0xC00000B7, (194, 186, 279, 447, 198, 425, 217, 218, 219)),
}

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
    """Answers the calls of UNCOVERED with EPERM from here on, and kills for those of another
    machine's numbering."""
    name = os.uname().machine
    if name not in UNCOVERED:
        raise OSError(0, f"its machine is {name}, and must be {' or '.join(UNCOVERED)}")
    machine, calls = UNCOVERED[name]
    refused = [(0x15, i, 0, call) for i, call in zip(range(len(calls), 0, -1), calls, strict=True)]
    program = [
        (0x20, 0, 0, 4),  # load the machine
        (0x15, 1, 0, machine),
        (0x06, 0, 0, 0x80000000),  # kill
        (0x20, 0, 0, 0),  # load the call
        (0x35, len(calls) + 1, 0, 0x40000000),  # those of x32
        *refused,
        (0x06, 0, 0, 0x7FFF0000),  # allow
        (0x06, 0, 0, 0x50001),  # refuse, with EPERM
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    _call(
        "prctl",
        PR_SET_SECCOMP,
        SECCOMP_FILTER,
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)),
        0,
        0,
    )
