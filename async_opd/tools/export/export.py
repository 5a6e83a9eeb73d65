"""A checkpoint's model as a folder to give away."""

import shutil
from contextlib import suppress
from pathlib import Path

from async_opd.config.load import read_run
from async_opd.core import files
from async_opd.core.errors import AsyncOpdError, CheckpointError, DataError
from async_opd.core.reading import in_words, refused
from async_opd.core.run_dir import LEARNER, MODEL, run_of
from async_opd.driver.checkpoints import Checkpoint, choose, find
from async_opd.tools.export.model_card import card

ADAPTER = "adapter_config.json"  # of an adapter's folder


def export(
    path: Path, output: Path | None, which: str | None, merged: bool = False
) -> tuple[Checkpoint, Path]:
    """Copy the model of a run, or of one of its checkpoints, to `output`, with a card; returns
    which one and where to.

    The newest, unless `which` names a step or says "best". Where an adapter was trained it is that,
    or `merged` with the model that it is of. It is verified first, and the folder
    appears whole or not at all. Raises RunMissing, CheckpointError, and DataError where there is
    something in that place.
    """
    run_dir = run_of(path)
    config = read_run(run_dir)
    output = output or run_dir / "export"
    with refused(f"{path}", CheckpointError):
        if output.exists() or output.is_symlink():
            raise DataError(
                f"{output}: is there already; name another folder with -o, or remove it"
            )
        checkpoint = choose(run_dir, which) if which else find(path)
    model = checkpoint.folder / MODEL
    if merged and not (model / ADAPTER).exists():
        raise DataError(f"--merged: {model} is a whole model: every weight was trained")
    parents = [parent for parent in output.parents if not parent.exists()]
    try:
        partial = files.begin_folder(output)
        if merged:
            _merge(checkpoint.folder, partial, config.run.trust_remote_code)
        else:
            shutil.copytree(model, partial, dirs_exist_ok=True)
        (partial / "README.md").write_text(
            card(run_dir, config, checkpoint, output.resolve().name, merged),
            encoding="utf-8",
            errors="backslashreplace",
        )
        files.commit_folder(output)
    except (OSError, AsyncOpdError) as e:
        shutil.rmtree(files.partial(output), ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # of what others have put there since
                parent.rmdir()
        if isinstance(e, AsyncOpdError):
            raise
        raise CheckpointError(f"{model}: cannot be copied to {output}: {_why(e)}") from e
    return checkpoint, output


def _merge(checkpoint: Path, output: Path, trust_remote_code: bool) -> None:
    """Write the student of `checkpoint` to `output` as one model, of the dtype that it had while it
    learned."""
    # which a copy does not wait for
    from async_opd.roles.learner.checkpoint import rank_state
    from async_opd.roles.learner.merge import merge

    dtype = rank_state(checkpoint / LEARNER, 0).dtype
    assert dtype
    model = checkpoint / MODEL
    merge(f"{model}", model, output, dtype, trust_remote_code=trust_remote_code)


def _why(error: OSError) -> str:
    """Say why files cannot be copied: the first of them, where several cannot."""
    if isinstance(error, shutil.Error):
        source, _, why = error.args[0][0]
        return f"{source}: {why}"
    return in_words(error)
