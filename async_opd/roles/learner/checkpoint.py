"""What the learner leaves on the disk: Hugging Face checkpoints that appear whole or not at all,
and of each rank what DeepSpeed does not keep."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from async_opd.core import files
from async_opd.core.errors import CheckpointError, CheckpointNotSaved, Diverged
from async_opd.core.foreign import foreign
from async_opd.core.lora import LoraConfig
from async_opd.maths.advantages import Moments
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.lora import NAME


class RankState(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank. JSON, so that it is read, and refused, before any pickle of DeepSpeed's is."""

    ranks: int
    zero_stage: int
    dtype: str | None  # a rank has resolved it
    version: int
    running: dict[str, Moments]
    random: dict[str, bytes]  # state of torch's generator by kind of device
    lora: LoraConfig | None = None  # None: every weight is trained
    base_sum: int | None = None  # of the weights that an adapter is beside: `lora.base_sum`


def save_rank(state: RankState, folder: Path, rank: int) -> None:
    """Write the state of `rank` to `folder`."""
    _rank_file(folder, rank).write_bytes(msgspec.json.encode(state))


def load_rank(
    folder: Path, rank: int, config: LearnerConfig, lora: LoraConfig | None, base_sum: int | None
) -> RankState:
    """Read the state of `rank` in `folder`. Raises CheckpointError, on every rank, where it does
    not fit `config` and `lora`, and where the adapter was beside other weights than those of
    `base_sum`."""
    state = rank_state(folder, 0)
    names = ("ranks", "zero_stage", "dtype")
    pairs = {f"learner.{name}": (getattr(state, name), getattr(config, name)) for name in names}
    for name, (then, now) in (pairs | {"student.lora": (state.lora, lora)}).items():
        if then != now:
            raise CheckpointError(
                f"checkpoint {folder.parent}: was saved with {name} = {then!r} and cannot go on"
                f" with {now!r}"
            )
    state = rank_state(folder, rank) if rank else state
    if state.base_sum != base_sum:
        raise CheckpointError(
            f"checkpoint {folder.parent}: student.model holds other weights now than those beside"
            " which its adapter was trained"
        )
    return state


class Source(NamedTuple):
    """What a student is saved with besides its weights and config, as it was read."""

    tokenizer: PreTrainedTokenizerBase
    generation_config: bytes | None  # the file's own; None where there is none


def read_source(path: str, trust_remote_code: bool = False) -> Source:
    """Read it from the model at `path`, a directory or hub id: neither need be there at the
    end."""
    file = generation_config_file(path)
    return Source(
        AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code),
        file and file.read_bytes(),
    )


def generation_config_file(path: str) -> Path | None:
    """Find the generation config of the model at `path`; None where it has none."""
    file = cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None


def save(model: Any, weights: dict[str, Tensor], source: Source, folder: Path) -> None:
    """Write `weights`, config, generation config and the tokenizer of `source` to `folder`,
    replacing it.

    `weights` are the parameters of `model` by name: under ZeRO-3 it does not hold them itself. An
    earlier folder stays until this one is whole. `transformers` and `vllm` load it. Raises
    CheckpointError where it cannot be written, and Diverged for weights that are not finite.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise Diverged(f"{folder}: {name} is not finite, and nothing to go on from")
    buffers = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter)
    }
    with writing(folder):
        partial = files.begin_folder(folder)
        loaded = getattr(model, "generation_config", None)
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(partial, state_dict=weights | buffers)
        finally:
            model.generation_config = loaded
        write_beside(loaded, source, partial)
        files.commit_folder(folder, replace=True)  # nobody reads it while the learner saves


def save_adapter(model: Any, adapter: dict[str, Tensor], source: Source, folder: Path) -> None:
    """Write the `adapter` of `model`, by the names of peft's files, its settings and the tokenizer
    of `source` to `folder`, as `save` does. `peft` loads it beside the model it names: where that
    lies on this machine, by its whole path."""
    for name, weight in adapter.items():
        if not weight.isfinite().all():
            raise Diverged(f"{folder}: {name} is not finite, and nothing to go on from")
    config = copy(model.peft_config[NAME])
    config.inference_mode = True
    base = Path(config.base_model_name_or_path)
    config.base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
    with writing(folder):
        partial = files.begin_folder(folder)
        save_file(adapter, partial / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(partial))
        source.tokenizer.save_pretrained(partial)
        files.commit_folder(folder, replace=True)


def write_beside(loaded: GenerationConfig | None, source: Source, folder: Path) -> None:
    """Write into `folder` what stands there beside weights and config. The generation config goes
    as it came, or as it was `loaded`: transformers refuses to save values that it reads and that
    others sample by."""
    source.tokenizer.save_pretrained(folder)
    file = folder / GENERATION_CONFIG_NAME
    if source.generation_config is not None:
        file.write_bytes(source.generation_config)
    elif loaded is not None:
        loaded.to_json_file(file, keys_to_pop=["compile_config"])


def writing(folder: Path) -> AbstractContextManager[None]:
    """Give a full disk one name: torch, safetensors and the standard library each have their
    own."""
    return foreign(f"{folder}: cannot be written", CheckpointNotSaved)


@contextmanager
def to_its_end(engine: Any) -> Iterator[None]:
    """Bring a save of DeepSpeed's `engine` to its end on every rank, the one whose disk is full
    among them: in its barriers the others would wait for that one in vain. Raises then what the
    disk refused."""
    refused: list[CheckpointError] = []

    def tried(write: Callable[..., Any]) -> Callable[..., None]:
        def attempt(*args: Any, **options: Any) -> None:
            try:
                with writing(Path(f"{options.get('path') or args[-1]}")):
                    write(*args, **options)
            except CheckpointError as e:
                refused.append(e)

        return attempt

    files_of, script = engine.checkpoint_engine, engine._copy_recovery_script
    files_of.save, files_of.makedirs = tried(files_of.save), tried(files_of.makedirs)
    engine._copy_recovery_script = tried(script)
    try:
        yield
    finally:
        del files_of.save, files_of.makedirs, engine._copy_recovery_script
    if refused:
        raise refused[0]


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def rank_state(folder: Path, rank: int) -> RankState:
    """Read the state of `rank` in `folder`. Raises CheckpointError where it is not seen."""
    file = _rank_file(folder, rank)
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
