"""Pure functions on flat token vectors: no config, no actors, no files, no logging.

Shape suffixes: `N` response tokens of a packed micro-batch, `K` candidates a position, `V`
vocabulary, `D` hidden width, `S` trajectories, `L` packed tokens (prompts too). Log-probs are in
nats.

What an objective is made of imports torch where a function calls it, not at the top, as checking a
config must not wait for it, and annotates by the `Tensor` here; `lag`, `packing` and `schedules` do
without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any
