"""What of the file system a program of Python needs: the interpreter, its standard library, the
shared libraries that these load, and the data that the library reads. Neither packages that are
installed nor anything else of /usr."""

import ctypes
import os
import sys
import sysconfig
import zoneinfo
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

PYTHON = os.path.realpath(sys.executable)
LOADED_LATER = ("libgcc_s.so.1",)  # by glibc, where a thread ends
SEARCHED = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")  # besides the folders of what is loaded
LOCALES = "/usr/lib/locale"


@cache
def needed() -> tuple[Path, ...]:
    """Lists files, folders, and the links that lead to them, each behind the folder it is in. Loads
    the libraries, to see which they are."""
    library = Path(os.path.realpath(os.__file__)).parent
    modules = [Path(path) for path in sys.path if Path(path).name == "lib-dynload"]
    folders = {library, *(Path(os.path.realpath(path)) for path in modules)}
    folders |= {Path(path) for path in (*zoneinfo.TZPATH, LOCALES) if Path(path).is_dir()}
    outer = {one for one in folders if folders.isdisjoint(one.parents)}
    loaded = {
        file for file in _loaded(modules) if outer.isdisjoint(file.parents) and not _packaged(file)
    }
    files = {Path(PYTHON)} | loaded
    return (*sorted(outer), *sorted(files), *sorted(_links(files)))


def _loaded(modules: list[Path]) -> Iterator[Path]:
    for name in (*LOADED_LATER, *(str(file) for path in modules for file in path.glob("*.so"))):
        with suppress(OSError):  # as of one whose own libraries are missing here
            ctypes.CDLL(name)
    for line in Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and "x" in fields[1] and Path(fields[5]).is_file():
            yield Path(fields[5])


def _packaged(file: Path) -> bool:
    """Tells whether a library came with a package, and so with what imports this."""
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return not {"site-packages", "dist-packages", *packages}.isdisjoint(
        {*file.parts, *map(str, file.parents)}
    )


def _links(files: set[Path]) -> Iterator[Path]:
    """Lists the links by which a loader finds `files`, and those in the paths of folders."""
    seen = {Path(folder) for folder in SEARCHED}
    for folder in seen | {file.parent for file in files}:
        if folder.is_symlink():
            yield folder
        elif folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink() and Path(os.path.realpath(entry.path)) in files:
                        yield Path(entry.path)
