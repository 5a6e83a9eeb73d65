"""Options that several commands share. A command is a file of this folder: its docstring is its
help, `arguments` adds what may stand behind it, `run` does it.

What a command loads, it loads in `run`: asking for help, or a mistake in the command line, must not
wait for torch.
"""

import argparse
from pathlib import Path

from async_opd.core.errors import ConfigError
from async_opd.core.files import from_home

OVERRIDES = "settings of the config to replace, such as learner.lr=1e-4"
ADDRESS = (
    "of the cluster's dashboard; else Ray's RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or"
    " http://127.0.0.1:8265"
)


def path(text: str) -> Path:
    """Parse a word of the command line that names a file or a folder. Raises ConfigError."""
    return Path(from_home(text))


def count(text: str) -> int:
    """Parse a word of the command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer >= 1")
    return int(text)


def write(path: Path, text: str) -> None:
    """Leave at `path` what a command was asked for. Raises ConfigError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from e
