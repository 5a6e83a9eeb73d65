"""Settings of the teacher."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct


class TeacherConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replicas` copies of one model, scoring exactly with transformers."""

    model: str  # local directory or hub id; its tokenizer must agree with the student's
    replicas: Annotated[int, Meta(ge=1)] = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_tokens: Annotated[int, Meta(ge=1)] = 8192  # packed tokens of one forward, prompts included
    flush_s: Annotated[float, Meta(ge=0)] = 0.0  # longest a request waits for company; 0: take what is queued
    head_chunk_rows: Annotated[int, Meta(ge=1)] = 1024  # rows of [·, vocabulary] held at once
    template_args: dict[str, Any] = {}  # for the teacher's own rendering of the prompt, where it differs
    evaluate: bool = False  # measure the teacher's own accuracy, once, before training
