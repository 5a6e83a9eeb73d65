"""Memory of each role on one GPU, by parts, from shapes and settings. Pure arithmetic, in bytes.

`Ψ` parameters, `b` bytes of one in the role's dtype, `R` learner ranks. What a CUDA context,
kernels and fragmentation take is not estimated: HEADROOM of a card is left for it. Engines of vLLM
keep to their `gpu_memory_utilization`.
"""

from dataclasses import dataclass, field

from async_opd.config.sections import SyncConfig
from async_opd.maths.blocks import head_block
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig
from async_opd.tools.plan.shape import Shape

BYTES = {"float32": 4, "bfloat16": 2, None: 2}  # absent, it is bfloat16 on GPUs
HEADROOM = 0.1  # of a card
REDUCED = 500_000_000  # gradients that DeepSpeed reduces at once: `reduce_bucket_size`
LIVE = 1_000_000_000  # weights that ZeRO-3 holds whole at once: `stage3_max_live_parameters`
ENGINE_TOKENS = 2048  # of one forward of a generator: vLLM's own default
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


def learner(config: LearnerConfig, shape: Shape, sync: SyncConfig) -> Memory:
    """Estimate a learner rank, by ZeRO stage (Rajbhandari et al., https://arxiv.org/abs/1910.02054,
    section 3).

    weights    bΨ; from stage 3 on bΨ/R, and as many as DeepSpeed holds whole
    gradients  float32, whatever the weights are: 4Ψ; from stage 2 on 4Ψ/R
    optimizer  Adam's two moments 8Ψ, and from stage 1 on a float32 master of the weights: 12Ψ/R;
               offloaded: none here
    buckets    gradients on their way: REDUCED of them from stage 2 on, whatever Ψ is; and two of
               weights on their way to the generators, which over gloo are the host's
    backward   activations, and the head's logits and gradient
    update     while the optimizer steps: a root of the second moment, and from stage 1 on its
               gradients once more
    """
    stage = config.zero_stage or 0
    psi = shape.parameters
    b = BYTES[config.dtype]
    share = shape.parameters / config.ranks
    state = 12 * share if stage else 8 * psi
    sent = 2 * sync.bucket_mib * 2**20
    reduced = b * (REDUCED if stage >= 2 else min(psi, REDUCED) if stage or config.ranks > 1 else 0)
    parts = {
        "weights": b * share + b * min(psi, LIVE) if stage == 3 else b * psi,
        "gradients": 4 * share if stage >= 2 else 4 * psi,
        "optimizer": state,
        "buckets": reduced + (sent if sync.backend == "nccl" else 0),
    }
    either = {
        "backward": activations(shape, config.micro_batch_tokens, b, config.gradient_checkpointing)
        + block(shape, config.head_chunk_rows)
        + b * shape.vocabulary * shape.hidden,
        "update": 8 * share if stage else 4 * psi,
    }
    host = 0 if sync.backend == "nccl" else sent
    if config.offload_optimizer:
        host += state + parts["gradients"]
        parts["optimizer"], either["update"] = 0, 0
    # a whole copy at each checkpoint, on rank 0
    return Memory(parts=parts, either=either, host=host + b * psi)


def activations(shape: Shape, tokens: int, b: int, checkpointing: bool) -> float:
    """Estimate what a forward of `tokens` keeps for its backward in the layers of `transformers`,
    whose norms are float32.

    A layer keeps for a token, in bytes: (4 + 2b) of each hidden unit in both norms; b of queries,
    attention's output and its reordered copy, of keys and values; (4 + b) of normed queries and
    keys; 4b of each unit of the MLP, or of the token's own experts, with their inputs and outputs,
    2b of a hidden unit, and the router's 12 an expert. With checkpointing each layer keeps b of a
    hidden unit, and one is made again as a whole. Then the final norm.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 2 * shape.hidden * (4 + 2 * b) + b * (3 * queries + 2 * keys)
    block += (4 + b) * (queries + keys) if shape.normed else 0
    mlp = 4 * b * shape.intermediate
    each = b * (4 * shape.expert_intermediate + 2 * shape.hidden)
    moe = shape.experts_per_token * each + 12 * shape.experts
    sparse, dense = shape.expert_layers, shape.layers - shape.expert_layers
    if checkpointing:
        kept = (
            shape.layers * b * shape.hidden
            + block
            + (max(moe, mlp) if sparse and dense else moe if sparse else mlp)
        )
    else:
        kept = shape.layers * block + dense * mlp + sparse * moe
    return tokens * (kept + shape.hidden * (4 + 2 * b))


def block(shape: Shape, rows: int | None) -> float:
    """Count two blocks of float32 logits: `maths.logprobs`."""
    held = head_block("cuda", rows)
    return 2 * held.rows * min(held.ids, shape.vocabulary) * 4


def generator(
    config: RolloutConfig | ScorerConfig,
    shape: Shape,
    sync: SyncConfig,
    card: float,
    concurrency: int,
) -> Memory:
    """Estimate an engine that samples: weights, a forward of ENGINE_TOKENS with the logits of
    `concurrency` sequences, in float32, as log-probs and sorted, the buckets in which weights
    arrive, and all that is left for keys and values."""
    held = forward(shape, ENGINE_TOKENS, BYTES[config.dtype], config.tensor_parallel_size)
    buckets = 2 * sync.bucket_mib * 2**20 if sync.backend == "nccl" else 0
    return _engine(
        config,
        shape,
        {"forward": held + 3 * 4 * concurrency * shape.vocabulary, "sync": buckets},
        card,
    )


def scorer(config: ScorerConfig, shape: Shape, card: float) -> Memory:
    """Estimate a teacher or reference: on vLLM weights, a forward of `batch_tokens` with the logits
    of PROMPT_ROWS of them, and keys and values; on transformers no cache, and the head's logits
    block by block. An average is the host's."""
    b, psi = BYTES[config.dtype], shape.parameters
    held = forward(shape, config.batch_tokens, b, config.tensor_parallel_size)
    if config.backend == "vllm":
        return _engine(
            config, shape, {"forward": held + 3 * 4 * PROMPT_ROWS * shape.vocabulary}, card
        )
    return Memory(
        parts={"weights": b * psi, "forward": held + block(shape, config.head_chunk_rows)},
        host=4 * psi if isinstance(config, TeacherConfig) and config.update == "ema" else 0,
    )


def _engine(
    config: RolloutConfig | ScorerConfig, shape: Shape, parts: dict[str, float], card: float
) -> Memory:
    """Leave to the key-value cache whatever is left of an engine's share of the card."""
    weights = BYTES[config.dtype] * shape.parameters / config.tensor_parallel_size
    left = config.gpu_memory_utilization * card - weights - sum(parts.values())
    return Memory(parts={"weights": weights, **parts, "kv_cache": max(left, 0.0)})


def forward(shape: Shape, tokens: int, b: int, tensor_parallel: int = 1) -> float:
    """Estimate the most that a forward without backward holds at once, b bytes of each: four times
    the hidden state, and what a layer's attention, its MLP or the token's own experts add while
    they run, split over GPUs. Of `transformers`; what vLLM fuses is less."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # gate, up and their product
    mlp = 3 * shape.intermediate if shape.layers > shape.expert_layers else 0
    moe = shape.experts_per_token * (4 * shape.expert_intermediate + 2 * shape.hidden)
    return tokens * b * (4 * shape.hidden + max(3 * queries + 2 * keys, mlp, moe) / tensor_parallel)
