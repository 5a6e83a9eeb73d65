"""Every argument of vLLM's engine that a table `engine` of the config may set, and why it may not
set the others. Those of a version that was not looked at yet may not be set."""

# Of a generator and of a teacher alike. {section} stands for the table's, {model} for the setting
# that names its model.
MAY = """
disable_log_stats aggregate_engine_logging enable_log_requests log_level logging_config
show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets
cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details
jit_monitor_mode jit_monitor_verbose enable_mm_processor_stats profiler_config

download_dir safetensors_load_strategy safetensors_prefetch_num_threads
safetensors_prefetch_block_size load_format model_loader_extra_config use_tqdm_on_load
pt_load_map_location max_parallel_loading_workers model_class_overrides model_impl

block_size enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval
prefix_match_unit kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_memory_bytes
num_gpu_blocks_override swa_bounded_replay disable_hybrid_kv_cache_manager
mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend
mamba_ssu_algorithm mamba_cache_philox_rounds enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm engram_config

max_num_scheduled_tokens long_prefill_token_threshold long_prefill_token_threshold_adaptive
max_num_active_seqs enable_chunked_prefill scheduler_reserve_full_isl prefill_schedule_interval
watermark async_scheduling stream_interval performance_mode speculative_config use_fp64_gumbel

compilation_config optimization_level cudagraph_capture_sizes max_cudagraph_capture_size
attention_config attention_backend kernel_config ir_op_priority enable_flashinfer_autotune
linear_backend moe_backend sparse_indexer_topk_backend gdn_prefill_backend kda_prefill_backend
kda_decode_backend disable_cascade_attn additional_config

decode_context_parallel_size dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size
cp_kv_cache_interleave_size enable_hc_sp all2all_backend expert_placement_strategy enable_dbo
ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold disable_custom_all_reduce
enable_shm_tensor_arena distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind
numa_bind_nodes numa_bind_cpus

language_model_only limit_mm_per_prompt skip_mm_profiling mm_processor_cache_gb mm_encoder_tp_mode

fail_on_environ_validation
"""

MODEL = "the model is {model}, as Hugging Face lays it out"
ONE_NODE = "an engine is one actor on one node, with {section}.tensor_parallel_size GPUs"
TEXT = "prompts are ids of text, and answers ids with their log-probs"
ADAPTER = "an adapter of the student is set by student.lora, and a teacher is one whole model"
OWN_KV = "KV of weights before an update would come back, and a prompt's log-probs never read it"
AWAKE = "nothing wakes an engine that sleeps, and updates expect its weights where they are"
SAMPLING = "what is sampled is the model's own distribution, as [rollout] bends it and no further"
REPLACED = "a lost engine is replaced by the run, [timeout] says when"
SPECULATION = "write speculative_config = { method = ..., num_speculative_tokens = ... }"
OWN_QUEUE = "groups wait in the engine's own queue, as many as the lag bound allows"

NEVER = {
    MODEL: """model model_weights served_model_name tokenizer tokenizer_mode tokenizer_revision
        hf_config_path config_format runner convert revision code_revision ignore_patterns
        skip_tokenizer_init""",
    "HF_TOKEN in the environment serves, and is not written into the run's config.json": "hf_token",
    "is set by {section}.dtype": "dtype",
    "is set by run.seed": "seed",
    "is set by run.trust_remote_code": "trust_remote_code",
    "is set by {section}.tensor_parallel_size": "tensor_parallel_size",
    "is set by {section}.gpu_memory_utilization": "gpu_memory_utilization",
    "follows from data.max_prompt_tokens and rollout.max_new_tokens": "max_model_len",
    "follows from what the objective asks for": "max_logprobs",
    "log-probs must be those of the distribution that was sampled from": "logprobs_mode",
    "is set by sync.backend": "weight_transfer_config",
    "is ours: which ids are sampled and scored stands there": "worker_extension_cls",
    "updates pause, cut off and go on by vLLM's own": "worker_cls scheduler_cls",
    "is ours: probes go before evaluations, these before the rest": "scheduling_policy",
    "ids are read off the whole logits, which it never makes": "enable_batch_sharded_sampling",
    "it cuts off attention that the learner, and the model itself, have": "disable_sliding_window",
    ONE_NODE: """pipeline_parallel_size prefill_context_parallel_size master_addr master_port nnodes
        node_rank device_ids distributed_executor_backend data_parallel_size data_parallel_rank
        data_parallel_start_rank data_parallel_size_local data_parallel_address
        data_parallel_rpc_port data_parallel_hybrid_lb data_parallel_external_lb
        data_parallel_multi_port_external_lb data_parallel_backend dp_sync_interval
        disable_nccl_for_dp_synchronization enable_elastic_ep elastic_ep_max_dp_size
        ray_workers_use_nsight""",
    SAMPLING: """generation_config override_generation_config logits_processors watermark_config
        diffusion_config enable_trace_replay""",
    SPECULATION: "spec_method spec_model spec_tokens",
    ADAPTER: """enable_lora max_loras max_lora_rank default_mm_loras fully_sharded_loras
        max_cpu_loras lora_dtype lora_target_modules enable_tower_connector_lora
        specialize_active_lora enable_mixed_moe_lora_format enable_moe_shared_loras
        max_lora_cls_labels""",
    OWN_KV: """kv_offloading_size kv_offloading_backend kv_transfer_config kv_events_config
        ec_transfer_config ec_manager_config""",
    AWAKE: """enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names
        enable_cumem_allocator enable_nccl_comm_suspend""",
    REPLACED: "enable_fault_tolerance fault_tolerance_config shutdown_timeout",
    OWN_QUEUE: "max_num_queued_reqs max_num_queued_tokens",
    "each actor's output has a file of its own in the run directory": "log_config_file",
    TEXT: """enable_prompt_embeds allowed_local_media_path allowed_media_domains enable_mm_embeds
        interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_type
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_attn_backend
        mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
        mm_encoder_fp8_scale_save_margin io_processor_plugin renderer_num_workers video_pruning_rate
        video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb
        mm_device_do_normalize disable_chunked_mm_input pooler_config structured_outputs_config
        aux_output_config enable_return_routed_experts return_sampling_mask reasoning_parser
        reasoning_parser_plugin reasoning_config tokens_only""",
}

# Of a generator alone, whose weights are updated in flight and must be the learner's.
FP = (
    "the learner's weights are not quantized, and an update that quantizes was never tested; KV may"
    " be (kv_cache_dtype)"
)
RELOADED = "an update fills a layer's weights where they lie, all of them in each worker"
GENERATOR_MAY = "max_num_batched_tokens kv_sharing_fast_prefill"
GENERATOR_NEVER = {
    "is set by rollout.concurrency": "max_num_seqs",
    "is set by rollout.enforce_eager": "enforce_eager",
    "the learner reads the model's own config.json; change it there": "hf_overrides",
    FP: "quantization quantization_config allow_deprecated_quantization",
    RELOADED: """cpu_offload_gb cpu_offload_params offload_backend offload_group_size
        offload_num_in_group offload_prefetch_step offload_params enable_expert_parallel enable_eplb
        eplb_config enable_ep_weight_filter""",
}

# Of a teacher alone, or a reference: its weights stay.
TEACHER_MAY = """
max_num_seqs enforce_eager hf_overrides quantization quantization_config
allow_deprecated_quantization cpu_offload_gb cpu_offload_params offload_backend offload_group_size
offload_num_in_group offload_prefetch_step offload_params enable_expert_parallel enable_eplb
eplb_config enable_ep_weight_filter
"""
TEACHER_NEVER = {
    "is set by {section}.batch_tokens": "max_num_batched_tokens",
    "log-probs of a prompt are wrong with it": "kv_sharing_fast_prefill",
}

# Values of what may be set otherwise, by their places.
NEVER_THIS: dict[str, tuple[object, str]] = {
    "load_format": ("dummy", "it makes up weights"),
    "speculative_config.rejection_sample_method": (
        "synthetic",
        "it accepts what the model would not have sampled",
    ),
}
