"""A checkpoint's model as a folder to give away."""

import shutil
from pathlib import Path

from async_opd.config.load import read_run
from async_opd.core.errors import CheckpointError, DataError
from async_opd.core.run_dir import run_of
from async_opd.driver.checkpoints import Checkpoint, choose, find
from async_opd.tools.export.model_card import card


def export(path: Path, output: Path | None, which: str | None) -> tuple[Checkpoint, Path]:
    """Copy the model of a run, or of one of its checkpoints, to `output`, with a card; returns
    which one and where to.

    The newest, unless `which` names a step or says "best". It is verified first, and the folder
    appears whole or not at all. Raises RunMissing, CheckpointError, and DataError where there is
    something in that place.
    """
    run_dir = run_of(path)
    config = read_run(run_dir)
    output = output or run_dir / "export"
    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: is there already; name another folder with -o, or remove it")
    found = choose(run_dir, which) if which else find(path)
    beside = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
        shutil.copytree(found.folder / "model", beside)
        (beside / "README.md").write_text(
            card(run_dir, config, found, output.resolve().name), encoding="utf-8"
        )
        beside.rename(output)
    except OSError as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{found.folder / 'model'}: cannot be copied to {output}: {e}") from e
    return found, output
