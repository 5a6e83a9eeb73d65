"""How a self-teacher follows the student."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from async_opd.core.errors import CheckpointNotSaved, DataError
from async_opd.core.foreign import foreign


class WeightEma:
    """An exponential moving average of the student's weights, or without a decay a copy, in the
    place of a model's own."""

    def __init__(self, model: PreTrainedModel, decay: float | None):
        """Begin with the weights of `model` as they are. `decay` d of t = d·t + (1-d)·s for each
        parameter; None copies.

        The average is float32 on the host (the parameters themselves where they are that): bfloat16
        has eight bits, and would round nearly every step of 1 % away.
        """
        self._parameters, self._decay = dict(model.named_parameters()), decay
        averaged = {} if decay is None else self._parameters
        self._average = {n: p.detach().to("cpu", torch.float32) for n, p in averaged.items()}

    @torch.no_grad()
    def update(self, student: dict[str, Tensor]) -> None:
        """Take one step to the `student`'s weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(
                student[name]
                if self._decay is None
                else self._average[name].lerp_(student[name].float(), 1 - self._decay)
            )

    def save(self, file: Path) -> None:
        """Write what the next update goes on from. Raises CheckpointError where it cannot be
        written."""
        parameters = self._parameters.items()
        weights = self._average or {n: p.detach().cpu().contiguous() for n, p in parameters}
        with foreign(f"{file}: cannot be written", CheckpointNotSaved):
            save_file(weights, file)

    @torch.no_grad()
    def restore(self, file: Path) -> None:
        """Be as at `save`."""
        for name, tensor in load_file(file).items():
            self._parameters[name].copy_(tensor)
            if self._decay is not None:
                self._average[name] = tensor


def read_parameters(folder: str, kind: type[PreTrainedModel]) -> dict[str, Tensor]:
    """Read the parameters of the checkpoint in `folder`, on the host, by their names in a model of
    `kind`. Raises DataError where this node does not see it."""
    if not Path(folder).is_dir():
        raise DataError(
            f"a self-teacher finds no {folder}: run.dir must lie on a disk that every node sees"
        )
    with foreign(f"a self-teacher reads {folder}"):
        return dict(kind.from_pretrained(folder, dtype="auto").named_parameters())
