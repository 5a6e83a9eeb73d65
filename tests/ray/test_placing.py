"""Where Ray puts the members of a run, on nodes and GPUs that only Ray believes in: no model is
loaded."""

import asyncio
import itertools
import time

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import ActorLost, ClusterTooSmall, ConfigError
from async_opd.core.vocabulary import Tokens
from async_opd.runtime.actor_specs import ActorSpec, ActorSpecs
from async_opd.runtime.cluster import Cluster
from async_opd.runtime.nodes import driver_node
from async_opd.runtime.placement import resource_requests
from async_opd.runtime.shared_disk import check_shared

pytestmark = pytest.mark.ray
SPLIT = "rollout.tensor_parallel_size=2"


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Everybody is idle."""
    spec = ActorSpec("tests.ray.idle:Idle", (str(tmp_path),))
    monkeypatch.setattr(ActorSpecs, "member", lambda self, pool, index: spec)
    monkeypatch.setattr(ActorSpecs, "learner_rank", lambda self, rank: spec)


@pytest.fixture(scope="module")
def nodes():
    """A head with two GPUs. What a test adds, and does not remove, is there in the next."""
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
    found.shutdown()


def starting(*overrides: str, emit=lambda what, who, why: None) -> Cluster:
    return Cluster(
        load(DEMO, list(overrides)),
        tokens=Tokens(student=((0, 24),), eos_ids=(1,)),
        tokenizer=Tokenizer(WordLevel()),
        emit=emit,
    )


async def where(cluster: Cluster) -> dict[str, tuple[str, str | None]]:
    """Node and cards of each that lives."""
    alive = [actor for actor in cluster._actors if not actor.killed]
    found = {actor.name: await actor.call(60, "where") for actor in alive}
    # what was asked of Ray
    assert [found[actor.name][0] for actor in alive] == [actor.node for actor in alive]
    return found


async def test_a_cluster_that_is_too_small_says_so_with_the_numbers_before_anything_starts(
    nodes, idle
):
    told = []
    small = starting(
        "rollout.generators=3",
        "timeout.nodes_s=2",
        emit=lambda what, who, why: told.append((what, why)),
    )
    with small as cluster:
        begun = time.monotonic()
        with pytest.raises(ClusterTooSmall, match=r"asked are 5 GPUs .* free are 2 \(.* 2 of 2\)"):
            await cluster.roles()
        assert time.monotonic() - begun < 5
        assert cluster._actors == []
    assert [what for what, _ in told] == ["waits"] and "asked are 5 GPUs" in told[0][1]
    with starting("rollout.generators=3", "timeout.nodes_s=0") as cluster:
        with pytest.raises(
            ClusterTooSmall, match=r"asked are 3 GPUs \(generator 3 x 1\), free are 2 "
        ):
            await cluster.evaluators()
        assert cluster._actors == []


async def test_nodes_that_come_in_time_are_waited_for(nodes, idle):
    with starting(SPLIT, "timeout.nodes_s=60") as cluster:
        coming = asyncio.create_task(cluster.roles())
        await asyncio.sleep(2)
        assert not coming.done() and cluster._actors == []
        nodes.add_node(num_cpus=1, num_gpus=2)
        await asyncio.wait_for(coming, 20)
        found = await where(cluster)
        assert (
            found["learner rank 0"][0]
            == found["teacher 0"][0]
            == driver_node()
            != found["generator 0"][0]
        )


async def test_members_go_where_they_fit_and_come_back_elsewhere_when_their_node_dies(
    nodes, idle, tmp_path
):
    third = nodes.add_node(num_cpus=1, num_gpus=2).node_id
    with starting(SPLIT, "learner.ranks=2") as cluster:
        await cluster.roles()
        found = await where(cluster)
        assert {found[f"learner rank {rank}"][0] for rank in range(2)} == {driver_node()}
        first, cards = found["generator 0"]
        assert sorted(cards.split(",")) == ["0", "1"]  # both of one node
        assert len({driver_node(), first, found["teacher 0"][0]}) == 3

        fourth = nodes.add_node(num_cpus=1, num_gpus=2).node_id
        nodes.remove_node(next(node for node in nodes.list_all_nodes() if node.node_id == first))
        for actor in [actor for actor in cluster._actors if actor.node == first]:
            actor.kill()  # as its pool does
            await cluster._spawn(*actor.name.rsplit(" ", 1))
        again, cards = (await where(cluster))["generator 0"]
        assert (
            again in (third, fourth) and again != first and sorted(cards.split(",")) == ["0", "1"]
        )


async def test_without_gpus_the_roles_have_nodes_of_their_own(nodes, idle, monkeypatch):
    monkeypatch.setattr(
        "async_opd.runtime.cluster.resource_requests",
        lambda config, gpus: resource_requests(config, False),
    )
    for _ in range(3):
        with starting("rollout.generators=2") as cluster:
            await cluster.roles()
            found = await where(cluster)
            places = [found[name][0] for name in ("learner rank 0", "generator 0", "generator 1")]
            assert places[0] == driver_node() and len(set(places)) == 3


async def test_a_learner_on_a_node_with_another_disk_is_refused_by_name(
    nodes, idle, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    with starting("learner.ranks=3", f"run.dir={tmp_path}/run", "timeout.nodes_s=10") as cluster:
        nodes.add_node(num_cpus=1, num_gpus=3)  # where the three ranks are together
        await cluster.roles()  # this machine's nodes have one disk
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]
        monkeypatch.setattr(
            "async_opd.runtime.actors.RemoteActor.ask_host", lambda self, *args, what: _no()
        )
        with pytest.raises(
            ConfigError,
            match=r"run.dir = .*: not seen by learner rank 0, learner rank 1, learner rank 2",
        ):
            await check_shared(cluster.config, cluster._actors)


async def _no() -> bool:
    return False


async def test_on_one_card_all_have_it_in_shares_and_start_one_after_the_other(idle, tmp_path):
    shares = "rollout.gpu_memory_utilization=0.4", "teacher.gpu_memory_utilization=0.3"
    with ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False):
        with starting("run.share_gpu=true", *shares) as cluster:
            await cluster.roles()
            found = await where(cluster)
            assert [found[f"{role} 0"][1] for role in ("learner rank", "generator", "teacher")] == [
                "0",
                "0",
                "0",
            ]
            await asyncio.sleep(1)
            assert ray.available_resources()["GPU"] == pytest.approx(0.05)
        # none goes on in the cluster that was there before, and is there still
        for actor in cluster._actors:
            with pytest.raises(ActorLost):
                for _ in range(100):  # Ray's order to die is on its way
                    await actor.call(60, "where")
                    await asyncio.sleep(0.1)
    times = sorted(
        tuple(map(float, file.read_text().split())) for file in tmp_path.iterdir() if file.is_file()
    )
    assert len(times) == 4
    assert all(end <= begun for (_, end), (begun, _) in itertools.pairwise(times))
