"""Every setting of DeepSpeed that the table `learner.deepspeed` may have, and why it may not have
the others."""

from typing import Annotated, Any, Literal

from msgspec import Meta

# Those outside of `zero_optimization`, with their types: DeepSpeed declares none for them.
MAY: dict[str, Any] = {
    "communication_data_type": Literal["fp32", "bf16"],  # small gradients are 0 in fp16
    "steps_per_print": Annotated[int, Meta(ge=1)],
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    "flops_profiler": dict[str, Any],
    "comms_logger": dict[str, Any],
    "timers": dict[str, Any],
}

BATCH = "is set by learner.trajectories_per_step and learner.micro_batch_tokens"
OPTIMIZER = "is set by learner.lr, betas, weight_decay, warmup_steps and schedule"
PRECISION = "is set by learner.dtype; gradients are summed in float32"
OFFLOAD = "is set by learner.offload_optimizer"
PARALLEL = (
    "a rank takes whole sequences through the whole model, sharded by learner.zero_stage alone"
)
CHECKPOINTS = "the run writes its checkpoints itself, and verifies them"
SINKS = "is set by run.sinks"
REMOVED = "DeepSpeed has it no more"

NEVER = {
    BATCH: """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
        managed_gradient_accumulation data_efficiency curriculum_learning dataloader_drop_last""",
    OPTIMIZER: "optimizer scheduler zero_allow_untested_optimizer",
    OFFLOAD: "zero_force_ds_cpu_optimizer aio",
    "it is for sums in fp16; ZeRO refuses it, or divides twice": """prescale_gradients
        gradient_predivide_factor""",
    "is set by learner.grad_clip": "gradient_clipping",
    "a step's loss is the mean over ranks": "gradient_allreduce_op",
    "ranks would go on with weights of their own": "disable_allgather",
    PRECISION: "bf16 bfloat16 fp16 torch_autocast data_types weight_quantization",
    "is set by learner.gradient_checkpointing": "activation_checkpointing",
    PARALLEL: """tensor_parallel expert_parallel sequence_parallel_size pipeline hybrid_engine
        use_data_before_expert_parallelism seq_parallel_communication_data_type""",
    CHECKPOINTS: "checkpoint datastates_ckpt",
    SINKS: "tensorboard wandb csv_monitor comet",
    "the learner's forward is not compiled": "compile",
    "a run is no search for settings; `async-opd plan` counts": "autotuning",
    "has no effect here": "vocabulary_size",
    REMOVED: """amp nebula compression_training quantize_training sparse_gradients eigenvalue
        sparse_attention elasticity graph_harvesting progressive_layer_drop""",
}

# Of the table `zero_optimization` in it; the rest of what DeepSpeed declares may be set.
LAYOUT = "checkpoints are laid out without it, and a run must go on from any of its own"
PUBLISHED = "weights that are gathered for the generators would not be those that are trained"
ZERO_NEVER = {
    "is set by learner.zero_stage": "stage",
    OFFLOAD: "offload_optimizer cpu_offload cpu_offload_use_pin_memory",
    "weights are sent from the device, whole ones in turn": "offload_param cpu_offload_param",
    "the gradient's norm is clipped, and a row of each step": "compute_grad_norm",
    LAYOUT: """parameter_alignment round_robin_gradients sub_group_size
        legacy_stage1 elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint""",
    PUBLISHED: "zero_quantized_weights zero_quantized_nontrainable_weights",
    "its optimizer moves weights late": "zenflow",
    "is of another optimizer": "save_muon_momentum_buffer_in_memory",
    CHECKPOINTS: """stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save""",
    REMOVED: "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param",
}
