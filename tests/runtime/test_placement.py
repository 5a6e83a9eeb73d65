"""Who asks for what, and where it goes, without a cluster."""

import re
from collections import Counter

import msgspec
import pytest

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.evaluation import load_eval, run_config
from async_opd.config.load import load
from async_opd.core.errors import ClusterTooSmall, ConfigError
from async_opd.runtime.placement import Node, choose, place, resource_requests

BIG = [
    "learner.ranks=4",
    "rollout.generators=4",
    "rollout.tensor_parallel_size=2",
    "teacher.backend=vllm",
    "teacher.replicas=2",
    "teacher.tensor_parallel_size=2",
]
SHARED = [
    "run.share_gpu=true",
    "rollout.gpu_memory_utilization=0.4",
    "teacher.gpu_memory_utilization=0.3",
]


def cluster(*gpus: int, cpus: float = 8) -> list[Node]:
    """Nodes a, b, c, … with so many GPUs each."""
    return [
        Node(id=id, address=id, cpus=cpus, gpus=n, free=n)
        for id, n in zip("abcdef", gpus, strict=False)
    ]


def where(
    overrides: list[str], nodes: list[Node], home: str = "", gpus: bool = True
) -> dict[str, str]:
    return {
        member: node.id
        for member, node in place(
            resource_requests(load(DEMO, overrides), gpus), nodes, home
        ).items()
    }


def of(placed: dict[str, str], role: str) -> list[str]:
    return [node for member, node in placed.items() if re.fullmatch(rf"{role} \d+", member)]


def test_every_role_asks_for_its_members_and_the_gpus_of_each():
    asked = {ask.role: (ask.count, ask.gpus) for ask in resource_requests(load(DEMO, BIG), True)}
    assert asked == {
        "learner rank": (4, 1),
        "generator": (4, 2),
        "teacher": (2, 2),
        "verifier": (1, 0),
    }


def test_without_gpus_nobody_asks_for_any():
    assert {ask.gpus for ask in resource_requests(load(DEMO, []), False)} == {0}


def test_the_reference_the_teachers_by_name_and_the_teachers_own_engines_are_pools_of_their_own():
    sampling = "teacher_sampling={share=0.5, full_until_step=1, until_step=2, generators=3}"
    asked = resource_requests(
        load(DEMO, ["objective={tag='g_opd', lambda=1.5}", sampling, "reference.replicas=2"]), True
    )
    pools = {ask.role: ask.count for ask in asked[1:]}
    assert pools == {
        "generator": 1,
        "teacher": 1,
        "reference": 2,
        "teacher-generator": 3,
        "verifier": 1,
    }
    demo = load(DEMO)
    named = msgspec.structs.replace(
        demo, teacher=None, teachers={"algebra": demo.teacher, "code": demo.teacher}
    )
    assert [ask.role for ask in resource_requests(named, True)][2:4] == [
        "teachers.algebra",
        "teachers.code",
    ]


def test_learner_ranks_are_packed_and_all_others_are_spread():
    placed = where(BIG, cluster(8, 8))
    assert of(placed, "learner rank") == ["a"] * 4
    assert Counter(of(placed, "generator")) == {"a": 2, "b": 2}
    assert of(placed, "teacher") == ["b", "b"]  # a is full


def test_the_learner_is_on_the_drivers_node_where_it_fits():
    assert set(of(where(BIG, cluster(8, 8, 8), home="c"), "learner rank")) == {"c"}
    assert set(of(where(BIG, cluster(8, 8, 2), home="c"), "learner rank")) == {"a"}


def test_ranks_that_no_node_holds_take_as_few_nodes_as_can_be():
    assert Counter(of(where(["learner.ranks=12"], cluster(4, 8, 4)), "learner rank")) == {
        "b": 8,
        "a": 4,
    }


def test_an_engine_of_several_gpus_is_never_split():
    with pytest.raises(ClusterTooSmall, match="no node has 4 left for the next generator"):
        where(["rollout.tensor_parallel_size=4"], cluster(3, 3, 3))


def test_the_learner_makes_room_for_an_engine_that_fits_nowhere_else():
    placed = where(["learner.ranks=2", "rollout.tensor_parallel_size=4"], cluster(4, 3), home="a")
    assert of(placed, "generator") == ["a"] and of(placed, "learner rank") == ["b", "b"]


def test_without_gpus_the_roles_are_spread_over_the_nodes():
    placed = where(
        ["rollout.generators=2", "teacher.replicas=2"], cluster(0, 0, 0), home="a", gpus=False
    )
    assert of(placed, "learner rank") == ["a"]
    assert len(set(of(placed, "generator"))) == len(set(of(placed, "teacher"))) == 2
    placed = where([], cluster(0, 0, 0), home="a", gpus=False)
    assert len({placed[member] for member in ("learner rank 0", "generator 0", "teacher 0")}) == 3


def test_what_asks_servers_is_on_the_drivers_node_from_which_they_were_looked_at():
    asks = ["teacher.backend=server", 'teacher.urls=["http://x:1", "http://localhost:2"]']
    for home, cpus in (("b", 8), ("b", 0)):
        nodes = cluster(2, 2, 2)
        nodes[1].cpus = cpus
        placed = where(asks, nodes, home=home)
        assert placed["teacher http://x:1"] == placed["teacher http://localhost:2"] == "b"
    request = resource_requests(load(DEMO, asks), True)[2]
    assert request.role == "teacher"
    assert choose(request, cluster(0, 0), "b").id == "b"  # one more, by `scale`


def test_a_head_without_cpus_is_left_alone():
    head, *workers = cluster(0, 0, 0)
    head.cpus = 0
    assert (
        "a" not in where(["rollout.generators=4"], [head, *workers], home="a", gpus=False).values()
    )


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers_and_what_to_change():
    with pytest.raises(ClusterTooSmall) as refused:
        where(BIG, cluster(8, 4))
    message = str(refused.value)
    assert "asked are 16 GPUs (learner rank 4 x 1, generator 4 x 2, teacher 2 x 2)" in message
    assert "free are 12 (a 8 of 8, b 4 of 4)" in message
    for setting in (
        "learner.ranks",
        "rollout.generators",
        "rollout.tensor_parallel_size",
        "teacher.replicas",
    ):
        assert setting in message
    assert refused.value.exit_status == 2 and "\n" not in message


def test_a_cluster_too_small_for_an_evaluation_is_refused_with_the_numbers_too():
    config = run_config(load_eval("toy:student", ["data.path=toy:heldout", "rollout.generators=3"]))
    generator, verifier = (
        ask for ask in resource_requests(config, True) if ask.role in ("generator", "verifier")
    )
    with pytest.raises(ClusterTooSmall) as refused:
        place([generator, verifier], cluster(1, 1))
    assert (
        str(refused.value)
        == "asked are 3 GPUs (generator 3 x 1), free are 2 (a 1 of 1, b 1 of 1): "
        "no node has 1 left for the next generator; lower rollout.generators, or add nodes"
    )
    with pytest.raises(ClusterTooSmall) as refused:
        place([verifier], [])  # of which no setting says how many there are
    assert (
        str(refused.value)
        == "asked are 0 GPUs (verifier 1 x 0), free are 0 (no node): no node has 0 left for the"
        " next verifier; add nodes"
    )


def test_a_member_in_place_of_a_lost_one_goes_where_few_of_its_role_are_and_room_is():
    nodes, generator = cluster(2, 2, 2), resource_requests(load(DEMO, []), True)[1]
    nodes[0].take(generator)
    nodes[1].take(generator)
    assert choose(generator, nodes).id == "c"
    assert choose(generator, nodes[:2]).id in "ab"
    nodes[0].take(generator)
    assert choose(generator, nodes[:2]).id == "b"
    nodes[1].take(generator)
    assert choose(generator, nodes[:2]) is None


def test_a_lost_member_comes_back_on_another_node_if_it_can():
    nodes, generator = cluster(2, 2), resource_requests(load(DEMO, []), True)[1]
    nodes[1].take(generator)
    assert choose(generator, nodes, lost="a").id == "b"  # though a has none of its role
    assert choose(generator, nodes[:1], lost="a").id == "a"


def test_on_one_card_each_has_its_share_of_memory_and_the_learner_what_is_left():
    asked = resource_requests(load(DEMO, SHARED), True)
    assert {ask.role: ask.gpus for ask in asked} == {
        "learner rank": 0.25,
        "generator": 0.4,
        "teacher": 0.3,
        "verifier": 0,
    }
    placed = where(SHARED, cluster(1, 1))
    assert len({placed[member] for member in ("learner rank 0", "generator 0", "teacher 0")}) == 1


REFUSED = {
    "too much memory": (
        [*SHARED, "rollout.gpu_memory_utilization=0.7"],
        r"1 x rollout.* = 0.7 \+ 1 x teacher.* = 0.3: must sum to less than 0.95",
    ),
    "the defaults": (SHARED[:1], "must sum to less than 0.95"),
    "two generators": (
        [*SHARED, "rollout.generators=2"],
        r"2 x rollout.gpu_memory_utilization = 0.4 .* must sum",
    ),
    "ranks": (
        [*SHARED, "learner.ranks=2"],
        "learner.ranks = 2: must be 1 with run.share_gpu = true",
    ),
    "nccl": (
        [*SHARED, "sync.backend=nccl"],
        "sync.backend = 'nccl': must be 'gloo' with run.share_gpu = true, NCCL refuses",
    ),
    "split": (
        [*SHARED, "rollout.tensor_parallel_size=2"],
        "rollout.tensor_parallel_size = 2: must be 1 with run.share_gpu",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_share_a_card_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(DEMO, overrides)
