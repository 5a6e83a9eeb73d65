"""Memory of a forward, and of a forward and backward, by a model's shape: what `transformers` and
`maths.logprobs` allocate. Bytes; `b` is of one element in the role's dtype."""

from dataclasses import dataclass

from async_opd.maths.blocks import HeadBlock, head_block
from async_opd.maths.packing import padded_groups
from async_opd.tools.plan.adapter import MLP, Adapter
from async_opd.tools.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Tokens of one forward, as attention sees them."""

    tokens: int
    places: int  # those that attention computes; more than tokens where it pads to the longest
    padded: bool = False
    # of one query head's scores in float32, [segments, longest, longest]; 0 where they are fused
    scores: int = 0


@dataclass(frozen=True, kw_only=True)
class Head:
    """What reads log-probs: a `block` of logits at a time, in float32, of which the objective's
    entropy and tail each hold one `more` for a while."""

    block: HeadBlock
    more: int = 0


def packed(shape: Shape, lengths: list[int], *, padded: bool) -> Packed:
    """Lay out segments of these `lengths`: as they are, or `padded` where there is no kernel for
    packed segments; on cards such have no fused kernel for grouped queries either."""
    tokens = sum(lengths)
    if not padded:
        return Packed(tokens=tokens, places=tokens)
    longest = [(len(part), max(lengths[i] for i in part)) for part in padded_groups(lengths)]
    grouped = shape.kv_heads < shape.heads
    return Packed(
        tokens=tokens,
        places=sum(count * length for count, length in longest),
        padded=True,
        scores=4 * sum(count * length**2 for count, length in longest) if grouped else 0,
    )


def block(rows: int | None, tokens: int, shape: Shape) -> HeadBlock:
    """Find the logits that the head holds at a time of `tokens`; absent `rows` are those of a
    card."""
    held = head_block("cuda", rows)
    return HeadBlock(min(held.rows, tokens), min(held.ids, shape.vocabulary))


def backward(
    shape: Shape,
    batch: Packed,
    b: int,
    *,
    checkpointing: bool,
    head: Head,
    adapter: Adapter | None = None,
) -> float:
    """Estimate the most that a forward and its backward hold at once, beside weights and the
    gradients that wait for the optimizer.

    It is one of four moments. With what all layers keep, but for the last:

    head       the final norm's input in float32, itself and what is selected of it; a float32
               block of logits and, beside it, their gradient in b or what entropy and tail hold;
               the head's gradient, and in half precision that of the block's ids in float32 and
               once more; its input's in float32 and once more
    MLP        with checkpointing the last layer, made again; gradients of gate and up while both
               and their product's are there, of experts also those of their outputs, or instead
               the gradient of the largest weight of all experts
    attention  the same without the MLP; gradients of queries, keys, values and output, and of
               scores that no kernel fuses
    embedding  its gradient, and no activations

    A tied head's gradient waits for the embedding's, and then both lie beside their sum. Beside an
    `adapter` head, embedding and norms get none, and the gradient of what goes into a layer has two
    parts.
    """
    hidden = b * batch.tokens * shape.hidden
    weight = 0 if adapter else b * shape.vocabulary * shape.hidden
    wide = 4 * batch.tokens * shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = activations(shape, batch, b, adapter)
    kept = _kept(shape, batch, b, checkpointing=checkpointing, adapter=adapter)
    again = attention + mlp if checkpointing else 0
    half = b if b < 4 else 0
    read = (4 + max(half, 4 * head.more)) * head.block.rows * head.block.ids
    read += (4 + half) * head.block.ids * shape.hidden if half and not adapter else 0
    waiting = kept + hidden + (weight if shape.tied else 0)
    return max(
        kept + 2 * wide + 3 * hidden + read + weight,
        waiting + again + _moved(shape, batch.tokens, b),
        waiting
        + again
        - mlp
        + 2 * b * batch.places * (queries + keys)
        + 2 * batch.scores * shape.heads,
        (3 if shape.tied else 1) * weight + hidden,
    )


def activations(
    shape: Shape, batch: Packed, b: int, adapter: Adapter | None = None
) -> tuple[float, float]:
    """Estimate what attention with both norms, and what an MLP, of one layer keep for the backward,
    the larger where there are two kinds of MLP.

    For a token (4 + 2b) of each hidden unit in both norms, which are float32; b of queries, keys,
    values and attention's output, where it is padded for each place, and of that output once more;
    (4 + b) of normed queries and keys; 4b of each unit of the MLP. Of the token's own experts the
    same with their inputs and outputs, 2b of a hidden unit, and the router's 12 an expert. Norms
    that get no gradient keep b less of each unit; beside an `adapter` only its own layers keep what
    goes into them, with b of what A gives, and what is left of the input where some is dropped.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm, inputs = 4 + b, 2  # inputs: of what both norms give
    if adapter:
        norm = 4
        inputs = adapter.reads("q_proj", "k_proj", "v_proj") + adapter.reads("gate_proj", "up_proj")
    attention = batch.tokens * shape.hidden * (2 * norm + b * inputs)
    attention += b * batch.places * (2 * queries + 2 * keys)
    if batch.padded and (adapter is None or adapter.reads("o_proj")):
        attention += b * batch.tokens * queries
    attention += batch.tokens * norm * (queries + keys) if shape.normed else 0
    attention += batch.scores * shape.heads
    attention += batch.tokens * _beside(adapter, b, mlp=False)
    return attention, batch.tokens * max(_dense(shape, b, adapter), _sparse(shape, b))


def _beside(adapter: Adapter | None, b: int, *, mlp: bool) -> int:
    """Count what an adapter keeps of a token in an MLP, or in attention."""
    if adapter is None:
        return 0
    layers = (each for each in adapter.layers if (each.name in MLP) is mlp)
    return sum(b * adapter.lora.rank + adapter.dropped(b) * each.inputs for each in layers)


def _kept(
    shape: Shape, batch: Packed, b: int, *, checkpointing: bool, adapter: Adapter | None
) -> float:
    """Estimate what all layers keep until the backward begins: their inputs, or all."""
    if checkpointing:
        return shape.layers * b * batch.tokens * shape.hidden
    attention, _ = activations(shape, batch, b, adapter)
    mlps = shape.dense_layers * _dense(shape, b, adapter) + shape.expert_layers * _sparse(shape, b)
    return shape.layers * attention + batch.tokens * mlps


def _moved(shape: Shape, tokens: int, b: int) -> float:
    """Estimate what the backward of an MLP adds to what it keeps."""
    dense = 2 * b * tokens * shape.intermediate if shape.dense_layers else 0
    if not shape.expert_layers:
        return dense
    chosen = 2 * b * tokens * shape.experts_per_token
    pair = 2 * b * shape.experts * shape.expert_intermediate * shape.hidden
    units = chosen * shape.expert_intermediate
    return max(dense, units + chosen * shape.hidden, pair - units)


def _dense(shape: Shape, b: int, adapter: Adapter | None) -> int:
    """Count what an MLP keeps of a token."""
    if not shape.dense_layers:
        return 0
    kept = 4 if adapter is None or adapter.reads("down_proj") else 3
    return kept * b * shape.intermediate + _beside(adapter, b, mlp=True)


def _sparse(shape: Shape, b: int) -> int:
    """Count what a token's own experts and their router keep of it."""
    if not shape.expert_layers:
        return 0
    each = b * (4 * shape.expert_intermediate + 2 * shape.hidden)
    return shape.experts_per_token * each + 12 * shape.experts


def forward(shape: Shape, batch: Packed, b: int, tensor_parallel: int = 1) -> float:
    """Estimate the most that a forward without backward holds at once: four times the hidden state,
    and what a layer's attention, its MLP or the token's own experts add while they run, split over
    GPUs. Of `transformers`; what vLLM fuses is less."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # gate, up and their product
    mlp = batch.tokens * 3 * shape.intermediate if shape.dense_layers else 0
    moe = batch.tokens * shape.experts_per_token
    moe *= 4 * shape.expert_intermediate + 2 * shape.hidden
    attention = batch.places * (3 * queries + 2 * keys) + 2 * batch.scores * shape.heads / b
    running = max(attention, mlp, moe) / tensor_parallel
    return b * (batch.tokens * 4 * shape.hidden + running)
