"""What of a run directory somebody may name instead of it."""

import re
from pathlib import Path

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"  # its folder of them
STEP = r"\d{6,}|\.\d{6,}\.(old|partial)"  # names there


def run_of(path: Path) -> Path:
    """The run directory that `path`, which is one or one of its checkpoints, belongs to."""
    checkpoint = checkpoint_at(path)
    return checkpoint.parent.parent if checkpoint else path


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that `path` names: as RUN/checkpoints/000100, from a working directory inside
    of that, by a link, or by the model in it. None for anything else, such as a run directory that
    lies in a folder `checkpoints`."""
    for named in (path, path.resolve()):
        folder = named.parent if named.name == "model" else named
        inside = folder.parent.name == CHECKPOINTS
        of_a_run = re.fullmatch(STEP, folder.name) or (folder.parent.parent / CONFIG).exists()
        if inside and of_a_run and not (folder / CONFIG).exists():
            return folder
    return None
