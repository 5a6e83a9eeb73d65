"""A save that the disk refuses, or that must not be."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from async_opd.core.errors import CheckpointError, Diverged
from async_opd.roles.learner import checkpoint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_and_an_earlier_folder_stays(tmp_path, bad):
    (tmp_path / "model").mkdir()
    weights = {"fine": torch.ones(2), "broken": torch.tensor([1.0, bad])}
    with pytest.raises(Diverged, match="broken is not finite"):
        checkpoint.save(nn.Linear(1, 1), weights, checkpoint.Source(None, None), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rank_whose_disk_is_full_still_comes_to_the_barriers_of_the_others():
    class Full:
        def save(self, state_dict, path):
            raise RuntimeError("PytorchStreamWriter failed writing file")

        def makedirs(self, path, exist_ok=False):
            raise OSError(28, "No space left on device", path)

    def script(path):
        raise OSError(28, "No space left on device", path)

    engine, barriers = SimpleNamespace(checkpoint_engine=Full(), _copy_recovery_script=script), []
    says = r"^there: cannot be written: .*No space left"
    with pytest.raises(CheckpointError, match=says), checkpoint.to_its_end(engine):
        engine.checkpoint_engine.makedirs("there", exist_ok=True)
        barriers.append(1)
        engine.checkpoint_engine.save({}, "there/a")
        engine.checkpoint_engine.save(state_dict={}, path=Path("there/b"))
        engine._copy_recovery_script("there")
        barriers.append(2)
    assert barriers == [1, 2]
    with pytest.raises(RuntimeError):  # and all is as before
        engine.checkpoint_engine.save({}, "there/a")
