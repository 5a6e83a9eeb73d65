"""Sizes of a student's adapter, by the model's shape: in elements."""

from typing import NamedTuple

from async_opd.core.lora import FUSED, LoraConfig
from async_opd.tools.plan.shape import Shape

MLP = {"gate_proj", "up_proj", "down_proj"}
ROWS = {"o_proj", "down_proj"}  # of which an engine splits what goes in over its GPUs


class Linear(NamedTuple):
    """A kind of linear layer, of which a model has so many."""

    name: str
    count: int
    inputs: int
    outputs: int


class Adapter(NamedTuple):
    """What is trained beside `layers`, of `beside` in all that have a weight of their own."""

    lora: LoraConfig
    layers: list[Linear]
    every: list[Linear]

    @property
    def parameters(self) -> int:
        """The number of what is trained: A and B of each layer."""
        return sum(
            self.lora.rank * each.count * (each.inputs + each.outputs) for each in self.layers
        )

    def reads(self, *names: str) -> bool:
        """Tell whether one of the layers of these names has it."""
        return any(each.name in names for each in self.layers)

    def dropped(self, b: int) -> int:
        """The bytes that a unit of what goes into A takes once some is dropped: it, in `b`, and
        whether it is left."""
        return b + 1 if self.lora.dropout else 0

    @property
    def half(self) -> int:
        """The largest A or B."""
        return self.lora.rank * max(max(each.inputs, each.outputs) for each in self.layers)

    @property
    def largest(self) -> int:
        """The largest weight that it is merged with."""
        return max(each.inputs * each.outputs for each in self.layers)

    @property
    def merged(self) -> int:
        """What travels where it is merged: weights that it changes, and those beside them that an
        engine takes in one go with them."""
        return sum(each.count * each.inputs * each.outputs for each in self._fused())

    def places(self, gpus: int) -> float:
        """What one of an engine's `gpus` has for it: A and B of the next rank that vLLM knows, of
        layers that it makes one of for all of them, and split as they are."""
        return self.lora.engine_rank * sum(
            each.count
            * (
                each.inputs / gpus + each.outputs
                if each.name in ROWS
                else each.inputs + each.outputs / gpus
            )
            for each in self._fused()
        )

    def _fused(self) -> list[Linear]:
        """List the layers that have it, and those that an engine makes one of with these."""
        names = {each.name for each in self.layers}
        together = set[str]().union(*(some for some in FUSED if some & names))
        return [each for each in self.every if each.name in together]


def adapter(lora: LoraConfig, shape: Shape) -> Adapter:
    """Size that of a model of this shape. Modules are counted by the last part of their names, in
    every layer; experts are no linear layers of it."""
    hidden, mlp = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    every = [
        Linear("q_proj", shape.layers, hidden, queries),
        Linear("k_proj", shape.layers, hidden, keys),
        Linear("v_proj", shape.layers, hidden, keys),
        Linear("o_proj", shape.layers, queries, hidden),
        Linear("gate_proj", shape.dense_layers, hidden, mlp),
        Linear("up_proj", shape.dense_layers, hidden, mlp),
        Linear("down_proj", shape.dense_layers, mlp, hidden),
    ]
    every = [each for each in every if each.count]
    if lora.target_modules == "all-linear":
        return Adapter(lora, every, every)
    names = {name.rpartition(".")[2] for name in lora.target_modules}
    return Adapter(lora, [each for each in every if each.name in names] or every, every)
