"""A new run directory, and the record of what a run is made with."""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from async_opd.core.errors import AsyncOpdError, ConfigError
from async_opd.core.run_dir import LEDGER

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")
GIT_S = 10.0  # to name the commit


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Make the run directory new; one that is there already is kept beside under a number. A
    mistake that shows before the first prompt is handed out leaves everything as it was."""
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    earlier = next(other for other in others if not other.exists())
    parents = [parent for parent in path.parents if not parent.exists()]
    try:
        if path.exists():
            path.rename(earlier)
        path.mkdir(parents=True)
    except OSError as e:
        raise ConfigError(f"run.dir = {str(path)!r}: cannot be made: {e.strerror}") from e
    try:
        yield path
    except AsyncOpdError as e:
        if e.exit_status == 2 and not (path / LEDGER).exists():
            shutil.rmtree(path)
            for folder in parents:
                with suppress(OSError):  # of what others have put there since
                    folder.rmdir()
            if earlier.exists():
                earlier.rename(path)
        raise


def environment(**others: Any) -> dict[str, Any]:
    """Look up the git commit and the versions of PACKAGES, and put `others` beside them."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    commit = None
    with suppress(OSError, subprocess.TimeoutExpired):
        git = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_S)
        commit = git.stdout.strip() or None
    return {
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES},
        **others,
    }
