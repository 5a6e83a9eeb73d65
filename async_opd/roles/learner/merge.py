"""An adapter of peft's, made one model with the one that it was trained beside."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    causal_lm.check_weights(f"{called}: its base {base!r}", base, dtype)
    own = (adapter / "tokenizer_config.json").exists()
    with foreign(f"{called}: an adapter of {base!r}"):
        lm = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            whole = PeftModel.from_pretrained(lm.float(), adapter).merge_and_unload()
        whole.to(getattr(torch, dtype)).config.dtype = dtype
        source = checkpoint.read_source(base, trust_remote_code)
        if own:
            source = source._replace(tokenizer=AutoTokenizer.from_pretrained(adapter))
    checkpoint.save(whole, dict(whole.named_parameters()), source, output)
