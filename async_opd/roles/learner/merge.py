"""An adapter of peft's, made one model with the one that it was trained beside."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as bars

from async_opd.core.foreign import foreign
from async_opd.core.reading import content_of
from async_opd.roles.learner import checkpoint
from async_opd.roles.models import causal_lm

SETTINGS = "adapter_config.json"


def merge(called: str, adapter: Path, output: Path, dtype: str, *, trust_remote_code: bool) -> None:
    """Write the model that the folder `adapter` names, in `dtype` and merged with it, to the folder
    `output`, replacing it. They are added in float32, as an update of the weights adds them.

    Raises DataError, which names it by `called`, where one of the two cannot be read, and
    CheckpointError where the sum cannot be written.
    """
    from peft import PeftModel  # which those who merge nothing do not wait for

    with foreign(f"{called}: its {SETTINGS}"):
        base = json.loads(content_of(adapter / SETTINGS))["base_model_name_or_path"]
    with _without_bars():
        causal_lm.check_weights(f"{called}: its base {base!r}", base, dtype)
        with foreign(f"{called}: an adapter of {base!r}"):
            lm = AutoModelForCausalLM.from_pretrained(
                base, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
            # some are kept in float32 whatever the others are
            dtypes = {name: tensor.dtype for name, tensor in lm.state_dict().items()}
            with torch.no_grad():  # on the host: cards, if there are any, are not this one's
                beside = PeftModel.from_pretrained(lm.float(), adapter, torch_device="cpu")
                whole = beside.merge_and_unload()
            for name, tensor in whole.state_dict(keep_vars=True).items():
                tensor.data = tensor.data.to(dtypes.get(name, getattr(torch, dtype)))
            whole.config.dtype = dtype
            source = checkpoint.read_source(base, trust_remote_code)
            if (adapter / "tokenizer_config.json").exists():
                tokenizer = AutoTokenizer.from_pretrained(
                    adapter, trust_remote_code=trust_remote_code
                )
                source = source._replace(tokenizer=tokenizer)
        checkpoint.save(whole, dict(whole.named_parameters()), source, output)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of what it reads and writes inside."""
    drawn = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            bars.enable_progress_bar()
