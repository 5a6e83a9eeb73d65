"""Settings of what scores rollouts: teachers, and the reference."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


class ScorerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replicas` copies of one model."""

    backend: Literal["transformers", "vllm"] = "transformers"  # vllm: for larger models; temperature 1, no entropy
    replicas: Annotated[int, Meta(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: Annotated[int, Meta(ge=1)] = 8192  # of one forward, prompts included; vllm on CPU holds their logits
    # transformers only
    flush_s: Annotated[float, Meta(ge=0)] = 0.0  # longest a request waits for company; 0: take what is queued
    head_chunk_rows: Annotated[int, Meta(ge=1)] = 1024  # rows of [·, vocabulary] held at once
    # vllm only
    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1  # GPUs of one replica
    memory_gib: Annotated[float, Meta(gt=0)] = 1.0  # KV cache of one engine on CPU
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.85


class TeacherConfig(ScorerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a teacher is, and what it is shown. With the student's own model it is a self-teacher."""

    model: str  # local directory or hub id; its tokenizer must agree with the student's
    template_args: dict[str, Any] = {}  # for the teacher's own rendering of the prompt, where it differs
    context: str | None = None  # shown instead of the prompt: text with {prompt} and {solution}
    max_prompt_tokens: Annotated[int, Meta(ge=1)] | None = None  # of its own rendering; absent: data.max_prompt_tokens
    update: Literal["frozen", "ema", "copy"] = "frozen"  # how a self-teacher follows the student; transformers only
    update_every_steps: Annotated[int, Meta(ge=1)] = 1  # the learner waits: a checkpoint is written and read
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] = 0.99  # d of t = d·t + (1-d)·s, ema only
    evaluate: bool = False  # measure the teacher's own accuracy, once, after training


class ReferenceConfig(ScorerConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy that some objectives measure against: never updated, and shown what the student is shown."""

    model: str | None = None  # absent: student.model, the student before its first step
