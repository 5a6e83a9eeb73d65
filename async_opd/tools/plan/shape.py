"""Sizes of a model by its config.json: parameters, experts, key-value cache."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from msgspec import Struct

from async_opd.config.paths import MODELS, context
from async_opd.core.errors import ConfigError
from async_opd.core.foreign import foreign
from async_opd.core.suggest import nearest

# config.json of common models, and each one's context by hub id
SHIPPED = Path(__file__).with_name("shapes.json")
# families whose queries, keys and values have a bias that config.json does not mention
MOST = 10**12  # of anything
BIASED = {"qwen2"}
NORMED = {"qwen3", "qwen3_moe"}
FAMILIES = ("gemma", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


class Shape(Struct, frozen=True, kw_only=True):
    """A decoder with full causal attention."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of a layer without experts
    vocabulary: int  # rows of the embedding
    tied: bool
    context: int | None
    experts: int = 0  # of a layer that has them
    experts_per_token: int = 0
    expert_intermediate: int = 0
    expert_layers: int = 0
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def parameters(self) -> int:
        """The number of weights, as `transformers` makes them: embedding, head where it is not
        tied, and for each layer attention (grouped queries), two norms and either an MLP of three
        matrices or a router and its experts."""
        hidden = self.hidden
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        attention = 2 * hidden * queries + 2 * hidden * keys
        if self.family in BIASED or self.attention_bias:
            attention += queries + 2 * keys
        attention += hidden if self.attention_bias else 0
        attention += 2 * self.head_dim if self.normed else 0
        mlp = 3 * hidden * self.intermediate + (
            2 * self.intermediate + hidden if self.mlp_bias else 0
        )
        moe = hidden * self.experts + 3 * hidden * self.expert_intermediate * self.experts
        blocks = self.layers * (attention + 2 * hidden)
        blocks += self.dense_layers * mlp + self.expert_layers * moe
        return self.vocabulary * hidden * (1 if self.tied else 2) + blocks + hidden

    @property
    def dense_layers(self) -> int:
        """The number of layers without experts."""
        return self.layers - self.expert_layers

    @property
    def largest(self) -> int:
        """The number of elements of the largest weight that is sent: of the embedding, or one of a
        layer's matrices."""
        width = max(self.intermediate, self.expert_intermediate, self.heads * self.head_dim)
        return self.hidden * max(self.vocabulary, width)

    @property
    def normed(self) -> bool:
        """Whether queries and keys are normed, head by head."""
        return self.family in NORMED

    def kv_bytes(self, bytes_each: int, tensor_parallel: int = 1) -> float:
        """Count the bytes of one token's key-value cache on one GPU: a key and a value of every
        key-value head in every layer. Heads are split while there are enough, then repeated."""
        whole = 2 * self.layers * self.kv_heads * self.head_dim * bytes_each
        return whole / min(tensor_parallel, self.kv_heads)


def of_all(
    models: Mapping[str, str], served: Collection[str], read: Callable[[str, str], Shape]
) -> dict[str, Shape]:
    """Have `read` the shapes of `models`, by the settings that name them; returned by the model's
    name. Of those `served` by others, in these sections, only the context counts: one whose shape
    cannot be counted is left out. Raises ConfigError for the others."""
    shapes: dict[str, Shape] = {}
    for key, model in models.items():
        unknown = (ConfigError,) if key.removesuffix(".model") in served else ()
        with suppress(*unknown):
            shapes[model] = shapes.get(model) or read(key, model)
    return shapes


def read(tree: dict, setting: str) -> Shape:
    """Read the shape that a config.json holds; `setting` is what messages call the model. Raises
    ConfigError."""
    family = tree.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{setting}: plan cannot count a model of type {family!r}, only {', '.join(FAMILIES)}"
        )
    for name, value in tree.items():
        if isinstance(value, int | float) and not abs(value) <= MOST:
            raise ConfigError(f"{setting}: its config has {name} = {value}: at most {MOST:g}")
    with foreign(f"{setting}: its config cannot be read", ConfigError), _missing(setting):
        layers, heads = tree["num_hidden_layers"], tree["num_attention_heads"]
        experts = tree.get("num_experts") or tree.get("num_local_experts") or 0
        every, dense = tree.get("decoder_sparse_step", 1), tree.get("mlp_only_layers") or []
        sparse = (
            sum(layer not in dense and (layer + 1) % every == 0 for layer in range(layers))
            if experts
            else 0
        )
        return Shape(
            family=family,
            layers=layers,
            hidden=tree["hidden_size"],
            heads=heads,
            kv_heads=tree.get("num_key_value_heads") or heads,
            head_dim=tree.get("head_dim") or tree["hidden_size"] // heads,
            intermediate=tree["intermediate_size"],
            vocabulary=tree["vocab_size"],
            tied=tree.get("tie_word_embeddings", family == "gemma"),
            context=context(tree),
            experts=experts,
            experts_per_token=tree.get("num_experts_per_tok", 0) if experts else 0,
            expert_intermediate=tree.get("moe_intermediate_size") or tree["intermediate_size"],
            expert_layers=sparse,
            attention_bias=tree.get("attention_bias", False),
            mlp_bias=tree.get("mlp_bias", False),
        )


@contextmanager
def _missing(setting: str) -> Iterator[None]:
    """Name what a config does not say."""
    try:
        yield
    except KeyError as e:
        raise ConfigError(f"{setting}: its config says nothing of {e}") from e


def local(setting: str, model: str) -> Shape | None:
    """Read the shape of a model that lies on this machine, or is the demo's; None for a hub id."""
    file = MODELS.get(model, Path(model)) / "config.json"
    return read(json.loads(file.read_bytes()), setting) if file.is_file() else None


def shipped(setting: str, model: str) -> Shape:
    """Look up the shape of a hub model without asking the hub. Raises ConfigError naming those that
    are known."""
    if model in (known := _shipped()):
        return read(known[model], setting)
    sizes = ", ".join(next(iter(tree["contexts"])) for tree in _trees())
    raise ConfigError(
        f"{setting} = {model!r}: --offline knows {sizes}, their Base, Instruct and other"
        f" variants{nearest(model, known)}"
    )


@cache
def _shipped() -> dict[str, dict]:
    return {
        model: tree | {"max_position_embeddings": context}
        for tree in _trees()
        for model, context in tree["contexts"].items()
    }


def _trees() -> list[dict]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))
