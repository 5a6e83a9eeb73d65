"""Pure functions on flat token vectors: no config, no actors, no files, no logging.

Shape suffixes: `N` response tokens of a packed micro-batch, `K` candidates a position, `V`
vocabulary, `D` hidden width, `S` trajectories, `L` packed tokens (prompts too). Log-probs are in
nats.

`maths.importance` and its siblings are imported when first touched: checking a config must not wait
for torch.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module:  # what the module itself needs, such as torch
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from e
