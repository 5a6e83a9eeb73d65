"""Estimates against arithmetic by hand, against what a forward holds, and vLLM's own packing."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.weight_transfer import packed_tensor

from async_opd.config.sections import SyncConfig
from async_opd.core.wire import Needs
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.models import causal_lm
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.passes import Packed, forward
from async_opd.tools.plan.shape import _shipped, read, shipped
from tests.tensor_memory import TensorMemory

GIB = 2**30
PSI = 8_190_735_360  # of Qwen3-8B
SHAPE = shipped("student.model", "Qwen/Qwen3-8B")
EMBEDDING = 151_936 * 4096  # its largest weight
BATCH = Packed(tokens=8192, places=8192)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def learner(sync: SyncConfig | None = None, **settings) -> memory.Memory:
    settings = (
        dict(trajectories_per_step=64, lr=1e-5, ranks=4, dtype="bfloat16", zero_stage=2) | settings
    )
    config = LearnerConfig(**settings)
    batch = Packed(tokens=config.micro_batch_tokens, places=config.micro_batch_tokens)
    nccl = SyncConfig(backend="nccl", bucket_mib=256)
    return memory.learner(config, SHAPE, sync or nccl, batch, Needs())


@pytest.mark.parametrize(
    ("settings", "weights", "gradients", "optimizer", "update"),
    [
        (dict(zero_stage=0, dtype="float32"), 4 * PSI, 4 * PSI, 8 * PSI, 4 * PSI),
        (dict(zero_stage=1), 2 * PSI, 6 * PSI, 12 * PSI / 4, 4 * PSI / 4),
        (dict(zero_stage=2), 2 * PSI, 4 * PSI / 4, 12 * PSI / 4, 4 * PSI / 4),
        (dict(zero_stage=3), 2 * PSI / 4, 4 * PSI / 4, 12 * PSI / 4, 8 * PSI / 4),
        (dict(zero_stage=2, offload_optimizer=True), 2 * PSI, 4 * EMBEDDING, 0, 0),
        (dict(zero_stage=2, ranks=8), 2 * PSI, 4 * PSI / 8, 12 * PSI / 8, 4 * PSI / 8),
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
    checkpoint, state = 2 * PSI, 12 * PSI / 4 + (4 + 2) * PSI / 4
    assert learner().host == checkpoint
    assert learner(offload_optimizer=True).host == checkpoint + state
    gloo = learner(SyncConfig(backend="gloo", bucket_mib=64))
    assert gloo.host == checkpoint + 2 * 64 * 2**20
    assert gloo.parts["buckets"] == 0


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes:UserWarning")
@pytest.mark.parametrize(
    ("model", "gib"), [("Qwen/Qwen3-1.7B", 1.7), ("Qwen/Qwen3-8B", 2.8), ("Qwen/Qwen3-0.6B", 1.1)]
)
def test_weights_over_nccl_take_two_chunks_of_a_bucket_and_a_weight(model, gib):
    """On rank 0 and on each GPU of a generator: no chunk of vLLM's own packing is larger, and the
    largest of each of its two streams are no less than half."""
    shape, sync = shipped("student.model", model), SyncConfig(backend="nccl")
    two = memory.chunks(shape, 2, sync)
    assert two / GIB == pytest.approx(gib, abs=0.06)
    assert learner().parts["buckets"] == memory.chunks(SHAPE, 2, sync)
    sizes = packed_sizes(_shipped()[model], sync.bucket_mib * 2**20)
    assert max(sizes) <= two / 2
    assert two / 2 <= max(sizes[0::2]) + max(sizes[1::2]) <= two


def packed_sizes(tree: dict, bucket: int) -> list[int]:
    """Sizes of the chunks that vLLM's producer makes of a model's weights."""
    with torch.device("meta"):
        config = AutoConfig.for_model(**{k: v for k, v in tree.items() if k != "contexts"})
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights, sizes = iter(lm.named_parameters()), []
    while chunk := packed_tensor.pack_tensors(weights, lambda item: item[1].detach(), bucket):
        sizes.append(chunk.packed_tensor.numel())
    return sizes


def test_only_the_larger_of_backward_and_update_counts():
    long, short = (
        learner(micro_batch_tokens=16384),
        learner(micro_batch_tokens=16, gradient_checkpointing=True),
    )
    assert long.total == sum(long.parts.values()) + long.either["backward"]
    assert short.total == sum(short.parts.values()) + short.either["update"]


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
    shape, batch = read(model.config.to_dict(), "teacher.model"), Packed(tokens=512, places=512)
    estimate = forward(shape, batch, memory.BYTES[dtype])
    assert estimate == pytest.approx(held.most, rel=0.1)


def test_a_generator_gives_its_cache_what_is_left_of_its_share():
    config = RolloutConfig(max_new_tokens=1024, dtype="bfloat16", gpu_memory_utilization=0.5)
    sync = SyncConfig(backend="nccl", bucket_mib=256)
    held = memory.generator(config, SHAPE, sync, 80 * GIB, concurrency=100, longest=2048)
    chunks = 2 * (256 * 2**20 + 2 * EMBEDDING)  # beside the share: vLLM knows nothing of them
    assert held.parts["sync"] == chunks and held.total == 40 * GIB + chunks
    running = 8192 * 2 * (4 * 4096 + 3 * 12288) + 3 * 4 * 100 * 151_936
    assert held.parts["weights"] == 2 * PSI and held.parts["forward"] == running
    assert held.parts["kv_cache"] == 40 * GIB - 2 * PSI - running


def test_tensor_parallel_engines_split_weights_and_cache_while_there_are_heads():
    config = TeacherConfig(model="m", backend="vllm", dtype="bfloat16", tensor_parallel_size=4)
    assert memory.scorer(config, SHAPE, 80 * GIB, BATCH).parts["weights"] == 2 * PSI / 4
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
    held = memory.scorer(config, SHAPE, 80 * GIB, BATCH)
    forward = 8192 * 2 * (4 * 4096 + 3 * 12288) + 2 * 1024 * 8192 * 4
    assert held.parts == {"weights": 2 * PSI, "forward": forward} and held.host == 4 * PSI
