"""Memory of each role on one GPU, by parts, from shapes and settings. Pure arithmetic, in bytes.

`Ψ` parameters, `b` bytes of one in the role's dtype, `R` learner ranks. Kernels' own workspace and
fragmentation are not estimated: HEADROOM of a card is left for them, and CONTEXT for what CUDA and
its libraries hold before a tensor is there. Engines of vLLM keep to their `gpu_memory_utilization`.
"""

from dataclasses import dataclass, field
from typing import Any

from async_opd.config.sections import SyncConfig
from async_opd.core.precision import Dtype, dtype_on
from async_opd.core.wire import Needs
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig
from async_opd.tools.plan.adapter import Adapter
from async_opd.tools.plan.passes import Head, Packed, backward, block, forward
from async_opd.tools.plan.shape import Shape

BYTES = {"float32": 4, "bfloat16": 2}
HEADROOM = 0.1  # of a card
CONTEXT = 1.5 * 2**30  # CUDA's context, cuBLAS's workspace, NCCL's own buffers
REDUCED = 500_000_000  # gradients that DeepSpeed reduces at once: `reduce_bucket_size`
REDUCED_WHOLE = 500_000_000  # the same of stages 0 and 1, which no setting changes
LIVE = 1_000_000_000  # weights that ZeRO-3 holds whole at once: `stage3_max_live_parameters`
# of one forward of a generator, by the memory of its card from so much on: what vLLM's own server
# takes, `roles.rollout.engine_args.prefilled_at_once`; an A100 of 80 GB takes fewer
ENGINE_TOKENS = {160 * 2**30: 16384, 70 * 2**30: 8192, 0: 2048}
PROMPT_ROWS = 1024  # of a prompt, whose logits vLLM holds at once


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that one GPU of a role holds, and its process on the host. Of `either` it holds one at
    a time."""

    parts: dict[str, float]
    either: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    @property
    def total(self) -> float:
        """The most that is held at once."""
        return sum(self.parts.values()) + max(self.either.values(), default=0.0)


def element(dtype: Dtype | None) -> int:
    """Count the bytes of an element on a card."""
    return BYTES[dtype_on(True, dtype)]


def chunks(shape: Shape, b: int, sync: SyncConfig, adapter: Adapter | None = None) -> float:
    """Count two chunks of weights on their way over nccl, on the learner's rank 0 and on each GPU
    of a generator: vLLM packs weights until they are more than a bucket, so a chunk is a bucket and
    a weight; of an `adapter` no more than there is."""
    if sync.backend != "nccl":
        return 0
    bucket = sync.bucket_mib * 2**20
    if adapter is None:
        return 2 * (bucket + b * shape.largest)
    alone = sync.lora == "adapter"
    largest = adapter.half if alone else adapter.largest
    return min(2 * (bucket + b * largest), b * (adapter.parameters if alone else adapter.merged))


def sent(shape: Shape, b: int, sync: SyncConfig, adapter: Adapter | None) -> float:
    """Count the bytes that an update carries to each GPU of a generator."""
    if adapter is None:
        return b * shape.parameters
    return b * (adapter.parameters if sync.lora == "adapter" else adapter.merged)


def learner(
    config: LearnerConfig,
    shape: Shape,
    sync: SyncConfig,
    batch: Packed,
    needs: Needs,
    adapter: Adapter | None = None,
) -> Memory:
    """Estimate a learner rank, by ZeRO stage (Rajbhandari et al., https://arxiv.org/abs/1910.02054,
    section 3), as DeepSpeed lays it out.

    weights    bΨ; from stage 3 on bΨ/R
    gradients  float32, whatever the weights are: 4Ψ; from stage 2 on 4Ψ/R; in stage 1 also in b,
               where that is less
    optimizer  Adam's two moments 8Ψ, and from stage 1 on a float32 master of the weights: 12Ψ/R
    buckets    weights on their way to the generators, which over gloo are the host's
    backward   a forward and backward of `batch` for an objective of such `needs`; from stage 2 on
               gradients on their way, REDUCED of them whatever Ψ is, or twice that where they
               travel beside the backward; in stage 3 weights that are held whole
    update     while the optimizer steps: a root of the second moment; in stage 3 its gradients once
               more; or, in stages 0 and 1, gradients on their way
    offloaded  optimizer and update are the host's, with the gradients from stage 2 on, and their
               sums over micro-batches in b; the largest weight's gradient has two places here

    Of an `adapter` Ψ is what is trained, but for the weights, which stay beside it. It is merged
    where an update is sent, a weight after the other: with B A, the weight and their sum in
    float32, and in stage 3 a bucket of weights that are held whole.
    """
    stage, b = config.zero_stage or 0, element(config.dtype)
    psi = adapter.parameters if adapter else shape.parameters
    held = b * (shape.parameters + (adapter.parameters if adapter else 0))
    zero, share = config.deepspeed.get("zero_optimization", {}), psi / config.ranks
    state = 12 * share if stage else 8 * psi
    travelling = b * zero.get("reduce_bucket_size", REDUCED)
    # of stage 2 beside the backward, unless it is told otherwise
    travelling *= 2 if stage == 2 and zero.get("overlap_comm", config.ranks > 1) else 1
    live = b * zero.get("stage3_max_live_parameters", LIVE)
    whole = min(held, live) if stage == 3 else 0
    parts = {
        "weights": held / config.ranks if stage == 3 else held,
        "gradients": 4 * share if stage >= 2 else (4 + (b if stage and b < 4 else 0)) * psi,
        "optimizer": state,
        "buckets": chunks(shape, b, sync, adapter),
    }
    computed = passed(config, shape, batch, needs, adapter)
    either = {
        "backward": computed + whole + (travelling if stage >= 2 else 0),
        "update": _update(stage, psi, config.ranks, b),
    }
    if adapter and sync.lora != "adapter":
        either["merged"] = _merged(stage, adapter, b, sync)
    host = 0 if sync.backend == "nccl" else 2 * sync.bucket_mib * 2**20
    if config.offload_optimizer:
        largest = adapter.half if adapter else shape.largest
        host += state + (4 + b) * share
        parts["optimizer"], either["update"] = 0, 0
        parts["gradients"] = 2 * b * largest + (4 * psi if stage == 1 else 0)
    # a whole copy at each checkpoint, on rank 0, of what is trained
    return Memory(parts=parts, either=either, host=host + b * psi)


def _merged(stage: int, adapter: Adapter, b: int, sync: SyncConfig) -> float:
    """Count what is held beside the rest while weights are merged: three of the largest in float32
    and what becomes of them; the bucket in hand in stage 3, which is whole."""
    bucket = min(sync.bucket_mib * 2**20 + b * adapter.largest, b * adapter.merged)
    return (12 + b) * adapter.largest + (bucket if stage == 3 else 0)


def passed(
    config: LearnerConfig,
    shape: Shape,
    batch: Packed,
    needs: Needs,
    adapter: Adapter | None = None,
) -> float:
    """Estimate the forward and backward of a micro-batch for an objective of such `needs`."""
    head = Head(
        block=block(config.head_chunk_rows, batch.tokens, shape),
        more=needs.student_entropy + needs.tail,
    )
    b, checkpointing = element(config.dtype), config.gradient_checkpointing
    return backward(shape, batch, b, checkpointing=checkpointing, head=head, adapter=adapter)


def scoring(config: LearnerConfig, shape: Shape, batch: Packed) -> float:
    """Estimate a forward of `batch` in the learner, whose adapters are off: what it reads, the head
    reads block by block."""
    held = block(config.head_chunk_rows, batch.tokens, shape)
    return forward(shape, batch, element(config.dtype)) + 2 * 4 * held.rows * held.ids


def _update(stage: int, psi: int, ranks: int, b: int) -> float:
    """Count what is held beside the rest while the optimizer steps."""
    share, reduced = psi / ranks, b * min(psi, REDUCED_WHOLE) if ranks > 1 else 0
    if stage < 2:
        return max(4 * share if stage else 4 * psi, reduced)
    return 4 * share if stage == 2 else 8 * share


def generator(
    config: RolloutConfig | ScorerConfig,
    shape: Shape,
    sync: SyncConfig,
    card: float,
    *,
    concurrency: int,
    longest: int,
    adapter: Adapter | None = None,
) -> Memory:
    """Estimate an engine that samples `concurrency` sequences at once, each of at most `longest`
    tokens: weights, a forward of ENGINE_TOKENS with the logits of all sequences, in float32, as
    log-probs and sorted, and all that is left of its share for keys and values; beside the share
    the chunks in which weights arrive, of which vLLM knows nothing. An `adapter` that comes alone
    has places of its own in the share."""
    b = element(config.dtype)
    at_once = next(tokens for least, tokens in ENGINE_TOKENS.items() if card >= least)
    tokens = config.engine.get("max_num_batched_tokens", min(at_once, longest * concurrency))
    places = (
        adapter.places(config.tensor_parallel_size) if adapter and sync.lora == "adapter" else 0
    )
    held = _engine(config, shape, tokens, concurrency, card, beside=b * places)
    held.parts["sync"] = chunks(shape, b, sync, adapter)
    return held


def scorer(config: ScorerConfig, shape: Shape, card: float, batch: Packed) -> Memory:
    """Estimate a teacher or reference: on vLLM weights, a forward of `batch_tokens` with the logits
    of PROMPT_ROWS of them, and keys and values; on transformers no cache, a forward of `batch`, and
    the head's logits block by block. An average is the host's."""
    if config.backend == "vllm":
        return _engine(config, shape, config.batch_tokens, PROMPT_ROWS, card)
    b, psi = element(config.dtype), shape.parameters
    held = block(config.head_chunk_rows, batch.tokens, shape)
    logits = 2 * 4 * held.rows * held.ids
    return Memory(
        parts={"weights": b * psi, "forward": forward(shape, batch, b) + logits},
        host=4 * psi if isinstance(config, TeacherConfig) and config.update == "ema" else 0,
    )


def _engine(
    config: RolloutConfig | ScorerConfig,
    shape: Shape,
    tokens: int,
    rows: int,
    card: float,
    *,
    beside: float = 0,
) -> Memory:
    """Leave to the key-value cache whatever is left of an engine's share of the card beside weights
    with what is `beside` them and a forward of `tokens` with the logits of `rows`."""
    b, gpus = element(config.dtype), config.tensor_parallel_size
    weights = _served(config.engine, shape, b) / gpus
    running = forward(shape, Packed(tokens=tokens, places=tokens), b, gpus)
    running += 3 * 4 * rows * shape.vocabulary
    left = config.gpu_memory_utilization * card - weights - beside - running
    parts = {"weights": weights, "adapter": beside, "forward": running, "kv_cache": max(left, 0.0)}
    return Memory(parts={name: part for name, part in parts.items() if part or name != "adapter"})


def _served(table: dict[str, Any], shape: Shape, b: int) -> float:
    """Count the weights of an engine: in fp8 all but embedding and head are of one byte."""
    kept = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    each = 1 if "fp8" in str(table.get("quantization")) else b
    return b * kept + each * (shape.parameters - kept)


def kv_bytes(config: RolloutConfig | ScorerConfig, shape: Shape) -> float:
    """Count the bytes of one token's keys and values on one GPU of an engine."""
    cached = str(config.engine.get("kv_cache_dtype", "auto"))
    each = 1 if cached.startswith("fp8") else element(config.dtype)
    return shape.kv_bytes(each, config.tensor_parallel_size)
