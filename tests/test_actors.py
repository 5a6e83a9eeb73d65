import pytest
from ray.exceptions import AuthenticationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.actors import Cluster, start_ray
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


def test_a_cluster_that_refuses_the_token_is_a_mistake_in_words(monkeypatch):
    def refuses(**_):
        raise AuthenticationError("Token authentication is enabled but no authentication token was found")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuses)
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS = '10\.0\.0\.1:6379': .*no authentication token was found"):
        start_ray()
