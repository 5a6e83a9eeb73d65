"""The student's weights as its checkpoint names them: transformers renames, fuses or splits some of
them in memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.roles.weight_sync.gloo import Piece, TensorMeta


def pieces(model: PreTrainedModel, parameters: dict[str, Tensor] | None = None) -> list[Piece]:
    """Find how the parameters of `model` go back to its checkpoint, in the order of its modules; a
    tied weight goes once. `parameters` are those of a model that holds others besides, by the names
    that they have without.

    Tried out without data, on meta tensors. Raises DataError for a weight that does not come back
    whole by parts.
    """
    empty = {
        # a weight that is sharded has none of its shape, and says what it was
        name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
        for name, p in (parameters or dict(model.named_parameters())).items()
    }
    together: dict[str, list[str]] = {}  # name of the first tensor they become: the parameters
    for name, parameter in empty.items():
        together.setdefault(min(_revert(model, {name: parameter})), []).append(name)
    whole = dict(_revert(model, empty))
    parts = []
    for names in together.values():
        become = _revert(model, {name: empty[name] for name in names})
        for name, tensor in become.items():
            if name not in whole or whole.pop(name).shape != tensor.shape:
                raise DataError(
                    f"student.model: {', '.join(names)} cannot be sent alone: {name} needs other"
                    " weights"
                )
        if sum(tensor.numel() for tensor in become.values()) != sum(
            empty[name].numel() for name in names
        ):
            raise DataError(
                f"student.model: {', '.join(names)} does not come back whole as {', '.join(become)}"
            )
        parts.append(
            Piece(
                tuple(names),
                tuple(
                    TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                    for name, tensor in become.items()
                ),
            )
        )
    return parts


def tensors(
    model: PreTrainedModel, pieces: Iterable[Piece], parameters: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Give the checkpoint's tensors of `pieces`, in order, made from the model's `parameters` when
    they are asked for."""
    for piece in pieces:
        held = {name: parameters[name].detach() for name in piece.parameters}
        if tuple(held) == tuple(meta.name for meta in piece.tensors):
            yield from held.values()
        else:
            reverted = _revert(model, held)
            yield from (reverted[meta.name] for meta in piece.tensors)


def _revert(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    # operations without a reverse raise
    with foreign(f"student.model: no way back to a checkpoint for {', '.join(parameters)}"):
        return revert_weight_conversion(model, parameters)
