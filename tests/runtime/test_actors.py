import asyncio
import logging
import signal

import pytest
from ray.exceptions import AuthenticationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.config.precision import with_dtypes
from async_opd.core.errors import ActorLost, ConfigError, HeadLost
from async_opd.core.vocabulary import Tokens
from async_opd.core.wire import Needs
from async_opd.objectives.topk_kl import TopkKl
from async_opd.runtime import cluster, nodes
from async_opd.runtime.cluster import Cluster
from async_opd.runtime.nodes import start_ray, taken_over

VLLM, TWO = "teacher.backend=vllm", "tensor_parallel_size=2"
REFUSED = {
    "given ids": (
        [VLLM],
        Needs(teacher_at_student_ids=4),
        "teacher.backend = 'vllm': must be .* given ids scored",
    ),
    "split teacher": (
        [VLLM, f"teacher.{TWO}"],
        Needs(),
        "teacher.tensor_parallel_size = 2: must be 1 .* without GPUs",
    ),
    "one card": (
        [
            "run.share_gpu=true",
            "rollout.gpu_memory_utilization=0.4",
            "teacher.gpu_memory_utilization=0.3",
        ],
        Needs(),
        "run.share_gpu = true: must be false on a cluster without GPUs",
    ),
    "split generator": (
        [f"rollout.{TWO}"],
        Needs(),
        "rollout.tensor_parallel_size = 2: must be 1 .* without GPUs",
    ),
}


@pytest.mark.parametrize(("overrides", "needs", "message"), REFUSED.values(), ids=REFUSED)
async def test_what_needs_gpus_is_refused_before_any_actor_starts(
    overrides, needs, message, monkeypatch
):
    monkeypatch.setattr(TopkKl, "needs", lambda self: needs)
    refused = Cluster(
        load(DEMO, overrides),
        tokens=Tokens(student=((0, 24),), eos_ids=(1,)),
        tokenizer=Tokenizer(WordLevel()),
    )
    refused.gpus = False  # as Ray says of a cluster without
    with pytest.raises(ConfigError, match=f"^{message}"):
        await refused.roles()
    assert refused._actors == []


@pytest.mark.parametrize(
    ("dtypes", "gpus", "exact"),
    [
        ([], False, True),
        ([], True, False),
        (["learner.dtype=float32", "rollout.dtype=float32"], True, True),
        (["learner.dtype=float32"], True, False),
        (["learner.dtype=bfloat16"], False, False),
        (["rollout.engine.kv_cache_dtype=fp8_e5m2"], False, False),
    ],
)
def test_log_probs_agree_to_the_last_digits_where_both_compute_in_float32(dtypes, gpus, exact):
    assert cluster.in_float32(with_dtypes(load(DEMO, dtypes), gpus=gpus)) is exact


class Ray:
    """Ray's connection, which takes SIGTERM and the level of its log as the real one does."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.said, self.connected, self.refuses = [], False, False
        patch.setattr("ray.is_initialized", lambda: self.connected)
        patch.setattr("ray.init", self.init)
        patch.setattr("ray.shutdown", self.shutdown)
        patch.setattr("ray.cluster_resources", dict)

    def init(self, logging_level: str, **_) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        logging.getLogger("ray").setLevel(logging_level)
        if self.refuses:
            raise AuthenticationError(
                "Token authentication is enabled but no authentication token was found"
            )
        self.said.append("connected")
        self.connected = True

    def shutdown(self) -> None:
        self.said += ["ended"] * self.connected
        self.connected = False


@pytest.fixture
def connection(monkeypatch):
    """Ray's; what is process-wide is afterwards as it was before."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(nodes, "canonicalize_bootstrap_address", lambda address: address)
    before = signal.getsignal(signal.SIGTERM), logging.getLogger("ray").level
    yield Ray(monkeypatch)
    assert (signal.getsignal(signal.SIGTERM), logging.getLogger("ray").level) == before


def a_cluster() -> Cluster:
    return Cluster(
        load(DEMO),
        tokens=Tokens(student=((0, 24),), eos_ids=(1,)),
        tokenizer=Tokenizer(WordLevel()),
    )


def test_a_cluster_ends_the_connection_that_it_has_begun(connection):
    for _ in range(2):
        with a_cluster():
            assert connection.connected
        assert not connection.connected


def test_a_connection_begun_ahead_of_the_cluster_is_ended_with_it(connection):
    start_ray()
    start_ray()
    with a_cluster():
        pass
    assert connection.said == ["connected", "ended"]


def test_a_callers_own_connection_stays_when_the_cluster_is_left(connection):
    connection.connected = True
    with a_cluster():
        pass
    taken_over().close()
    assert connection.connected and connection.said == []


def test_of_two_clusters_the_one_that_began_the_connection_ends_it(connection):
    with a_cluster():
        with a_cluster():
            pass
        assert connection.connected
    assert connection.said == ["connected", "ended"]


def test_a_connection_that_no_cluster_took_is_ended_by_who_takes_it_over(connection):
    start_ray()
    taken_over().close()
    assert connection.said == ["connected", "ended"]


def test_a_cluster_that_cannot_be_entered_leaves_no_connection(connection, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), a_cluster():
        pass
    assert connection.said == ["connected", "ended"]


def test_every_actor_is_killed_whatever_becomes_of_the_others(connection):
    class Member:
        def kill(self):
            connection.said.append("killed")
            raise RuntimeError("it is gone")

    with pytest.raises(RuntimeError, match="it is gone"), a_cluster() as entered:
        entered._actors += [Member(), Member()]
    assert connection.said == ["connected", "killed", "killed", "ended"]


@pytest.mark.parametrize("shows", ["by itself", "by an actor", "to one who is interrupted"])
async def test_where_rays_head_is_lost_that_ends_the_work_and_is_told(
    connection, monkeypatch, shows
):
    async def lost(every_s, patience_s):
        return "raylet died"

    async def works(*args):
        if shows != "by itself":
            monkeypatch.setattr(cluster, "dead_head", lambda: "raylet died")
            raise ActorLost("learner 0 died") if shows == "by an actor" else asyncio.CancelledError
        await asyncio.sleep(60)

    monkeypatch.setattr(cluster, "wait_for_resources", works)
    monkeypatch.setattr(cluster, "kill_own_head", lambda: None)
    if shows == "by itself":
        monkeypatch.setattr(cluster, "head_lost", lost)
    ends = asyncio.CancelledError if "interrupted" in shows else HeadLost
    says = "^$" if "interrupted" in shows else "raylet died; .*--resume"
    with pytest.raises(ends, match=says), a_cluster() as entered:
        await entered.evaluators()
    assert connection.said == ["connected", "ended"]
    assert asyncio.current_task().cancelling() == 0  # the task goes on


def test_a_cluster_that_refuses_the_token_is_a_mistake_in_words(connection, monkeypatch):
    connection.refuses = True
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(
        ConfigError, match=r"^RAY_ADDRESS = '10\.0\.0\.1:6379': .*no authentication token was found"
    ):
        start_ray()
