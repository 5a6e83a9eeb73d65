"""The manifest of a checkpoint: which files it consists of."""

import hashlib
import os
from pathlib import Path

from msgspec import Struct

from async_opd.core.reading import opened
from async_opd.core.run_dir import LEARNER, MODEL, STATE


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the manifest."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> "File":
        """Describe the file of that name in `folder`."""
        with opened(folder / name) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name, os.fstat(file.fileno()).st_size, sha256)


def names(folder: Path) -> list[str]:
    """Name every file of `folder`."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths]


def unlisted(listed: set[str], files: list[str] | None) -> str:
    """Name what a manifest lacks of `files`, or of any run's where they are not known."""
    if STATE not in listed:
        return STATE
    if files is not None:
        return next((name for name in files if name not in listed), "")
    folders = {name.partition("/")[0] for name in listed}
    return next((f"{part}/" for part in (MODEL, LEARNER) if part not in folders), "")
