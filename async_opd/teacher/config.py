"""Settings of the teacher."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


class TeacherConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replicas` copies of one model."""

    model: str  # local directory or hub id; its tokenizer must agree with the student's
    backend: Literal["transformers", "vllm"] = "transformers"  # vllm: for larger models; temperature 1, no entropy
    replicas: Annotated[int, Meta(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: Annotated[int, Meta(ge=1)] = 8192  # of one forward, prompts included; vllm on CPU holds their logits
    template_args: dict[str, Any] = {}  # for the teacher's own rendering of the prompt, where it differs
    evaluate: bool = False  # measure the teacher's own accuracy, once, before training
    # transformers only
    flush_s: Annotated[float, Meta(ge=0)] = 0.0  # longest a request waits for company; 0: take what is queued
    head_chunk_rows: Annotated[int, Meta(ge=1)] = 1024  # rows of [·, vocabulary] held at once
    # vllm only
    tensor_parallel_size: Annotated[int, Meta(ge=1)] = 1  # GPUs of one replica
    memory_gib: Annotated[float, Meta(gt=0)] = 1.0  # KV cache of one engine on CPU
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.85
