"""Recipes on GPUs that only Ray believes in: where each member goes, and which cards it sees."""

from itertools import combinations

import pytest
from ray.cluster_utils import Cluster as Nodes
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.config.load import load
from async_opd.core.vocabulary import Tokens
from async_opd.runtime.actor_specs import ActorSpec, ActorSpecs
from async_opd.runtime.cluster import Cluster
from async_opd.tools.cluster_files.render import ROLES

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two_nodes_of_eight():
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 8})
    nodes.add_node(num_cpus=1, num_gpus=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        patch.setattr(ActorSpecs, "member", lambda self, pool, index: IDLE)
        patch.setattr(ActorSpecs, "learner_rank", lambda self, rank: IDLE)
        yield
    nodes.shutdown()


IDLE = ActorSpec("tests.ray.idle:Idle", ())


@pytest.mark.parametrize("recipe", ["one_gpu", "multi_node_deepmath"])
async def test_every_member_sees_as_many_cards_as_it_asks_for_and_nobody_elses(
    two_nodes_of_eight, recipe, tmp_path
):
    config = load(f"configs/{recipe}.toml", [f"run.dir={tmp_path}/run"])
    tokens = Tokens(student=((0, 24),), eos_ids=(1,))
    with Cluster(config, tokens=tokens, tokenizer=Tokenizer(WordLevel())) as cluster:
        await cluster.roles()
        shown = {}
        for actor in cluster._actors:
            node, cards = await actor.call(120, "where")
            # by which a pod tells whether a role still lives in it
            assert (await actor.call(120, "title")).startswith(tuple(f"ray::{r}" for r in ROLES))
            shown[actor.name] = {(node, card) for card in (cards or "").split(",") if card}
    asked = {name: each for each in cluster._requests.values() for name in each.members}
    assert set(shown) == set(asked)
    for name, cards in shown.items():
        assert len(cards) == -(-asked[name].gpus // 1), name  # of a share the whole card
        assert len({node for node, _ in cards}) <= 1
    if config.run.share_gpu:
        assert len(set().union(*shown.values())) == 1
        return
    assert not any(shown[one] & shown[other] for one, other in combinations(shown, 2))
