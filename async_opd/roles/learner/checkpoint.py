"""What the learner leaves on the disk: Hugging Face checkpoints that appear whole or not at all,
and of each rank what DeepSpeed does not keep."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from async_opd.core import files
from async_opd.core.errors import CheckpointError
from async_opd.maths.advantages import Moments
from async_opd.roles.learner.config import LearnerConfig


class RankState(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank. JSON, so that it is read, and refused, before any pickle of DeepSpeed's is."""

    ranks: int
    zero_stage: int
    dtype: str
    version: int
    running: dict[str, Moments]
    random: dict[str, bytes]  # state of torch's generator by kind of device


def save_rank(state: RankState, folder: Path, rank: int) -> None:
    """Write the state of `rank` to `folder`."""
    _rank_file(folder, rank).write_bytes(msgspec.json.encode(state))


def load_rank(folder: Path, rank: int, config: LearnerConfig) -> RankState:
    """Read the state of `rank` in `folder`. Raises CheckpointError, on every rank, where it does
    not fit `config`."""
    state = _read(_rank_file(folder, 0))
    for name in ("ranks", "zero_stage", "dtype"):
        then, now = getattr(state, name), getattr(config, name)
        if then != now:
            raise CheckpointError(
                f"checkpoint {folder.parent}: was saved with learner.{name} = {then!r} and cannot"
                f" go on with {now!r}"
            )
    return _read(_rank_file(folder, rank)) if rank else state


def save(model: PreTrainedModel, weights: dict[str, Tensor], source: str, folder: Path) -> None:
    """Write `weights`, config, generation config and the tokenizer of `source` to `folder`,
    replacing it.

    `weights` are the parameters of `model` by name: under ZeRO-3 it does not hold them itself. An
    earlier folder stays until this one is whole. `transformers` and `vllm` load it. Raises
    CheckpointError where it cannot be written.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    buffers = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
    }
    with writing(folder):
        partial = files.begin_folder(folder)
        model.save_pretrained(partial, state_dict=weights | buffers)
        tokenizer.save_pretrained(partial)
        files.commit_folder(folder, replace=True)  # nobody reads it while the learner saves


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Give a full disk one name: torch, safetensors and the standard library each have their
    own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        raise CheckpointError(f"{folder}: cannot be written: {e}") from e


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _read(file: Path) -> RankState:
    try:
        return msgspec.json.decode(file.read_bytes(), type=RankState)
    except OSError as e:
        raise CheckpointError(
            f"{file}: {e.strerror}; every learner rank must see the run directory"
        ) from e


def random_state() -> dict[str, bytes]:
    """The state of PyTorch's random numbers, by kind of device."""
    return {
        device: source.get_rng_state().numpy().tobytes() for device, source in _sources().items()
    }


def restore_random_state(state: dict[str, bytes]) -> None:
    """Go on with the random numbers of `state`, on the devices that are here."""
    for device, source in _sources().items():
        if device in state:
            source.set_rng_state(torch.frombuffer(bytearray(state[device]), dtype=torch.uint8))


def _sources() -> dict[str, ModuleType]:
    return {"cpu": torch, "cuda": torch.cuda} if torch.cuda.is_available() else {"cpu": torch}
