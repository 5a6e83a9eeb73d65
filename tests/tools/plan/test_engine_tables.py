"""What tables that are passed through change in a plan."""

import pytest

from async_opd.config.sections import SyncConfig
from async_opd.core.wire import Needs
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.passes import Packed
from async_opd.tools.plan.shape import shipped

GIB = 2**30
SHAPE = shipped("student.model", "Qwen/Qwen3-8B")
BATCH = Packed(tokens=8192, places=8192)
GRADIENTS = 100_000_000


def generator(card: float = 80 * GIB, **engine) -> memory.Memory:
    config = RolloutConfig(max_new_tokens=8192, engine=engine)
    return memory.generator(config, SHAPE, SyncConfig(), card, concurrency=64, longest=10240)


def forward(tokens: int) -> int:
    """A forward of that many tokens of Qwen3-8B, with the logits of 64 sequences."""
    return tokens * 2 * (4 * 4096 + 3 * 12288) + 3 * 4 * 64 * 151_936


@pytest.mark.parametrize(
    ("card", "tokens"), [(24, 2048), (48, 2048), (80, 8192), (141, 8192), (192, 16384)]
)
def test_a_generator_takes_as_many_tokens_at_once_as_vllms_server_on_such_a_card(card, tokens):
    assert generator(card * GIB).parts["forward"] == forward(tokens)


def test_a_generator_takes_no_more_tokens_at_once_than_its_sequences_have():
    config = RolloutConfig(max_new_tokens=8, concurrency=64)
    held = memory.generator(config, SHAPE, SyncConfig(), 80 * GIB, concurrency=64, longest=16)
    assert held.parts["forward"] == forward(64 * 16)


def test_batched_tokens_of_a_table_take_memory_from_the_cache():
    few, many = generator(), generator(max_num_batched_tokens=32768)
    assert many.parts["forward"] == forward(32768)
    taken = forward(32768) - forward(8192)
    assert few.parts["kv_cache"] - many.parts["kv_cache"] == taken


def test_a_cache_in_fp8_has_room_for_twice_the_tokens():
    def each(**engine) -> float:
        return memory.kv_bytes(RolloutConfig(max_new_tokens=8, engine=engine), SHAPE)

    assert each() == each(kv_cache_dtype="auto") == 147_456
    assert each(kv_cache_dtype="fp8") == each(kv_cache_dtype="fp8_e5m2") == 147_456 / 2


def test_a_teacher_in_fp8_keeps_embedding_and_head_as_they_are():
    def weights(**engine) -> float:
        config = TeacherConfig(model="m", backend="vllm", tensor_parallel_size=2, engine=engine)
        return memory.scorer(config, SHAPE, 80 * GIB, BATCH).parts["weights"]

    kept = 2 * 151_936 * 4096
    assert weights() == SHAPE.parameters  # two bytes, two cards
    assert weights(quantization="fp8") == (2 * kept + SHAPE.parameters - kept) / 2


@pytest.mark.parametrize(
    ("stage", "overlap", "buckets"), [(2, {}, 2), (2, {"overlap_comm": False}, 1), (3, {}, 1)]
)
def test_fewer_gradients_reduced_at_once_take_less_beside_the_backward(stage, overlap, buckets):
    def backward(**zero) -> float:
        config = LearnerConfig(
            trajectories_per_step=64,
            lr=1e-5,
            ranks=4,
            zero_stage=stage,
            deepspeed={"zero_optimization": overlap | zero} if overlap | zero else {},
        )
        return memory.learner(config, SHAPE, SyncConfig(), BATCH, Needs()).either["backward"]

    fewer = backward() - backward(reduce_bucket_size=GRADIENTS)
    assert fewer == buckets * 2 * (500_000_000 - GRADIENTS)
