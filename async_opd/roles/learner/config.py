"""Settings of the learner."""

from typing import Annotated, Any, Literal, Self

from msgspec import Meta, Struct
from msgspec.structs import replace

from async_opd.core.precision import Dtype, dtype_on


class LearnerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One optimizer step trains `trajectories_per_step` trajectories over `ranks` data-parallel
    ranks."""

    trajectories_per_step: Annotated[int, Meta(ge=1)]
    lr: Annotated[float, Meta(gt=0, lt=1)]
    ranks: Annotated[int, Meta(ge=1)] = 1
    # 1, 2, 3: optimizer, gradients, weights sharded over ranks. Absent: 0, or 1 where 0 cannot be:
    # in bfloat16, and with `offload_optimizer`.
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload_optimizer: bool = False  # its state and step on the host; ZeRO 1 to 3
    # Absent: bfloat16 on GPUs, float32 on CPUs.
    dtype: Dtype | None = None
    betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    grad_clip: Annotated[float, Meta(gt=0)] = 1.0  # global L2 norm
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    # After the warm-up, to 0 at the last step.
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    # Packed tokens of one forward, prompts included.
    micro_batch_tokens: Annotated[int, Meta(ge=1)] = 8192
    # Rows of [·, vocabulary] held at once; absent: by device, `maths.blocks.head_block`.
    head_chunk_rows: Annotated[int, Meta(ge=1)] | None = None
    # Logits of bfloat16 are not rounded to it: nearer to what a head in float32 has sampled.
    head_float32: bool = False
    gradient_checkpointing: bool = False
    # Passed to DeepSpeed, checked against its config: such as zero_optimization.reduce_bucket_size.
    deepspeed: dict[str, Any] = {}

    def on(self, gpus: bool) -> Self:
        """Write down what absent settings mean on GPUs, or on CPUs."""
        dtype, stage = dtype_on(gpus, self.dtype), self.zero_stage
        if stage is None:
            stage = 1 if dtype == "bfloat16" or self.offload_optimizer else 0
        return replace(self, dtype=dtype, zero_stage=stage)
