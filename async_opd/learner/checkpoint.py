"""Hugging Face checkpoints that appear whole or not at all."""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

STATE = "async_opd.json"  # version and running moments: what a Hugging Face checkpoint has no place for


def save(model: PreTrainedModel, weights: dict[str, Tensor], source: str, state: dict, folder: Path) -> None:
    """Write `weights`, config, generation config, the tokenizer of `source` and `state` to `folder`, replacing it.

    `weights` are the parameters of `model` by name: under ZeRO-3 it does not hold them itself.
    Written beside, synced, then renamed, so a reader never sees half of it. `transformers` and `vllm` load it.
    """
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    kept = model.state_dict(keep_vars=True).items()
    buffers = {name: tensor for name, tensor in kept if not isinstance(tensor, nn.Parameter)}
    model.save_pretrained(beside, state_dict=weights | buffers)
    AutoTokenizer.from_pretrained(source).save_pretrained(beside)
    (beside / STATE).write_text(json.dumps(state), encoding="utf-8")
    for file in beside.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
