import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.actors import Cluster
from async_opd.commands.demo import CONFIG as DEMO
from async_opd.config import load
from async_opd.errors import ConfigError
from async_opd.objectives.topk_kl import TopkKl
from async_opd.wire import Needs

VLLM, TWO = "teacher.backend=vllm", "tensor_parallel_size=2"
REFUSED = {
    "given ids": ([VLLM], Needs(teacher_at_student_ids=4), "teacher.backend = 'vllm': must be .* given ids scored"),
    "split teacher": ([VLLM, f"teacher.{TWO}"], Needs(), "teacher.tensor_parallel_size = 2: must be 1 .* without GPUs"),
    "one card": (
        ["run.share_gpu=true", "rollout.gpu_memory_utilization=0.4", "teacher.gpu_memory_utilization=0.3"],
        Needs(),
        "run.share_gpu = true: must be false on a cluster without GPUs",
    ),
    "split generator": ([f"rollout.{TWO}"], Needs(), "rollout.tensor_parallel_size = 2: must be 1 .* without GPUs"),
}


@pytest.mark.parametrize(("overrides", "needs", "message"), REFUSED.values(), ids=REFUSED)
async def test_what_needs_gpus_is_refused_before_any_actor_starts(overrides, needs, message, monkeypatch):
    monkeypatch.setattr(TopkKl, "needs", lambda self: needs)
    cluster = Cluster(load(DEMO, overrides), eos_ids=[1], tokenizer=Tokenizer(WordLevel()))
    cluster._gpus = 0  # as Ray says of a cluster without
    with pytest.raises(ConfigError, match=f"^{message}"):
        await cluster.roles()
    assert cluster._actors == []
