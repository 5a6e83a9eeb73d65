"""Estimates against arithmetic by hand, and against what torch keeps for a backward."""

import pytest
import torch

from async_opd.config.sections import SyncConfig
from async_opd.maths.logprobs import ReadOptions, read_logprobs
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.models import attention, causal_lm
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.shape import read, shipped
from tests.tensor_memory import TensorMemory

GIB = 2**30
PSI = 8_190_735_360  # of Qwen3-8B
SHAPE = shipped("student.model", "Qwen/Qwen3-8B")
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def learner(sync: SyncConfig | None = None, **settings) -> memory.Memory:
    settings = (
        dict(trajectories_per_step=64, lr=1e-5, ranks=4, dtype="bfloat16", zero_stage=2) | settings
    )
    return memory.learner(
        LearnerConfig(**settings), SHAPE, sync or SyncConfig(backend="nccl", bucket_mib=256)
    )


@pytest.mark.parametrize(
    ("settings", "weights", "gradients", "optimizer", "update"),
    [
        (dict(zero_stage=0, dtype="float32"), 4 * PSI, 4 * PSI, 8 * PSI, 4 * PSI),
        (dict(zero_stage=1), 2 * PSI, 4 * PSI, 12 * PSI / 4, 8 * PSI / 4),
        (dict(zero_stage=2), 2 * PSI, 4 * PSI / 4, 12 * PSI / 4, 8 * PSI / 4),
        (dict(zero_stage=3), 2 * PSI / 4 + 2e9, 4 * PSI / 4, 12 * PSI / 4, 8 * PSI / 4),
        (dict(zero_stage=2, offload_optimizer=True), 2 * PSI, 4 * PSI / 4, 0, 0),
        (dict(zero_stage=2, ranks=8), 2 * PSI, 4 * PSI / 8, 12 * PSI / 8, 8 * PSI / 8),
    ],
)
def test_a_learner_rank_holds_its_share_by_zero_stage(
    settings, weights, gradients, optimizer, update
):
    held = learner(**settings)
    parts = (
        held.parts["weights"],
        held.parts["gradients"],
        held.parts["optimizer"],
        held.either["update"],
    )
    assert parts == (weights, gradients, optimizer, update)


def test_an_offloaded_optimizer_is_the_hosts_and_so_are_buckets_over_gloo():
    checkpoint, state = 2 * PSI, 12 * PSI / 4 + 4 * PSI / 4
    assert learner().host == checkpoint
    assert learner(offload_optimizer=True).host == checkpoint + state
    gloo = learner(SyncConfig(backend="gloo", bucket_mib=64))
    assert gloo.host == checkpoint + 2 * 64 * 2**20
    assert learner().parts["buckets"] - gloo.parts["buckets"] == 2 * 256 * 2**20


def test_only_the_larger_of_backward_and_update_counts():
    long, short = (
        learner(micro_batch_tokens=16384),
        learner(micro_batch_tokens=16, gradient_checkpointing=True),
    )
    assert long.total == sum(long.parts.values()) + long.either["backward"]
    assert short.total == sum(short.parts.values()) + short.either["update"]


def kept_bytes(model, tokens: int) -> int:
    """What autograd keeps of a forward through the layers and the head, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # held, so that no other takes its place
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids_L = torch.zeros(tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_LD = causal_lm.hidden_states(model, ids_L, [tokens // 2, tokens - tokens // 2])
        read_logprobs(hidden_LD, causal_lm.head(model), ids_L, ReadOptions(1.0, 64))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("Qwen2", {}),
        ("Qwen3", dict(intermediate_size=512)),
        ("Qwen3Moe", EXPERTS),
    ],
)
def test_activations_are_what_torch_keeps_for_the_backward(
    tiny_lm, family, settings, dtype, monkeypatch
):
    monkeypatch.setattr(attention, "SHORT", 0)  # as on a card, which is what a plan is for
    sizes = dict(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
    )
    model = tiny_lm(family, attn_implementation=causal_lm.ATTENTION, **(sizes | settings)).to(
        getattr(torch, dtype)
    )
    shape, b = read(model.config.to_dict(), "student.model"), memory.BYTES[dtype]
    estimate = memory.activations(shape, 64, b, checkpointing=False)
    assert kept_bytes(model.train(), 64) == pytest.approx(estimate, rel=0.03)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    one_layer = memory.activations(shape, 64, b, checkpointing=True) - 64 * (
        4 * b * shape.hidden + shape.hidden * (4 + 2 * b)
    )
    assert kept_bytes(model, 64) + one_layer == pytest.approx(
        memory.activations(shape, 64, b, checkpointing=True), rel=0.03
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("family", "settings"), [("Qwen3", {}), ("Llama", {}), ("Qwen3Moe", EXPERTS)]
)
def test_a_forward_without_backward_holds_what_is_estimated(tiny_lm, family, settings, dtype):
    sizes = dict(
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    settings = sizes | settings | ({"moe_intermediate_size": 128} if settings else {})
    model = (
        tiny_lm(family, attn_implementation=causal_lm.ATTENTION, **settings)
        .to(getattr(torch, dtype))
        .eval()
    )
    ids_L = torch.zeros(512, dtype=torch.int64)
    with torch.no_grad(), TensorMemory() as held:
        causal_lm.hidden_states(model, ids_L, [256, 256])
    estimate = memory.forward(
        read(model.config.to_dict(), "teacher.model"), 512, memory.BYTES[dtype]
    )
    assert estimate == pytest.approx(held.most, rel=0.1)


def test_a_generator_gives_its_cache_what_is_left_of_its_share():
    config = RolloutConfig(max_new_tokens=1024, dtype="bfloat16", gpu_memory_utilization=0.5)
    held = memory.generator(
        config, SHAPE, SyncConfig(backend="nccl", bucket_mib=256), 80 * GIB, concurrency=100
    )
    assert held.total == 40 * GIB
    assert held.parts["weights"] == 2 * PSI and held.parts["sync"] == 512 * 2**20
    forward = 2048 * 2 * (4 * 4096 + 3 * 12288) + 3 * 4 * 100 * 151_936
    assert held.parts["forward"] == forward
    assert held.parts["kv_cache"] == 40 * GIB - 2 * PSI - 512 * 2**20 - forward


def test_tensor_parallel_engines_split_weights_and_cache_while_there_are_heads():
    config = TeacherConfig(model="m", backend="vllm", dtype="bfloat16", tensor_parallel_size=4)
    assert memory.scorer(config, SHAPE, 80 * GIB).parts["weights"] == 2 * PSI / 4
    sizes = (1, 4, 8, 16)
    assert [SHAPE.kv_bytes(2, size) for size in sizes] == [
        147_456,
        36_864,
        18_432,
        18_432,
    ]


def test_a_scorer_on_transformers_has_no_cache_and_its_average_is_the_hosts():
    config = TeacherConfig(
        model="m", update="ema", dtype="bfloat16", batch_tokens=8192, head_chunk_rows=1024
    )
    held = memory.scorer(config, SHAPE, 80 * GIB)
    forward = 8192 * 2 * (4 * 4096 + 3 * 12288) + 2 * 1024 * 8192 * 4
    assert held.parts == {"weights": 2 * PSI, "forward": forward} and held.host == 4 * PSI
