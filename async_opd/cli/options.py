"""Options that several commands share. A command is a file of this folder: its docstring is its
help, `arguments` adds what may stand behind it, `run` does it.

What a command loads, it loads in `run`: asking for help, or a mistake in the command line, must not
wait for torch.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path

from async_opd.core.errors import ConfigError
from async_opd.core.files import from_home
from async_opd.core.reading import looked_up

OVERRIDES = "settings of the config to replace, such as learner.lr=1e-4"
ADDRESS = (
    "of the cluster's dashboard; else Ray's RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or"
    " http://127.0.0.1:8265"
)


def count(text: str) -> int:
    """Parse a word of the command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer >= 1")
    return int(text)


def path(text: str) -> Path:
    """Parse a word of the command line that names a file or folder, which need not be there; a
    leading ~ stands for the home. Raises ConfigError."""
    if not text:
        raise ConfigError("'': a path must not be empty")
    there = from_home(text)
    looked_up(repr(text), there)
    return Path(there)


def write(path: Path, text: str) -> int:
    """Leave at `path` what a command was asked for: whole, or what was there before. Return its
    bytes. Raises ConfigError."""
    from async_opd.core.files import partial, write_file

    content = text.encode(errors="backslashreplace")
    place = Path(os.path.realpath(path))  # a link stays one
    try:
        if not place.exists() or place.is_file():
            write_file(place, content)
        else:
            path.write_bytes(content)  # a pipe or a terminal, such as /dev/stdout
    except OSError as e:
        with suppress(OSError):
            partial(place).unlink()
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e
    return len(content)
