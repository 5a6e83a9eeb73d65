"""What of a run's servers has to be there when its actors start, and what may come later."""

import asyncio

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from async_opd.cli.demo import CONFIG as DEMO
from async_opd.config.load import load
from async_opd.core.errors import ActorLost
from async_opd.core.vocabulary import Tokens
from async_opd.runtime.cluster import Cluster
from async_opd.runtime.placement import resource_requests

A, B = "http://a:1", "http://b:1"


def pool_of(config, *down: str):
    """The ports of the teacher's pool, where these members do not start."""
    tokens = Tokens(student=((0, 24),), eos_ids=(1,))
    cluster = Cluster(config, tokens=tokens, tokenizer=Tokenizer(WordLevel()))

    async def spawn(pool, which, nodes):
        if which in down:
            raise ActorLost(f"{pool} {which}: cannot be reached")
        return f"{pool} {which}"

    cluster._spawn = spawn
    request = next(r for r in resource_requests(config, gpus=False) if r.role == "teacher")
    return asyncio.run(cluster._pool(request, {}))


def test_servers_that_are_away_when_a_run_starts_again_are_waited_for():
    config = load(DEMO, ["teacher.backend=server", f'teacher.urls=["{A}", "{B}"]'])
    assert pool_of(config) == [f"teacher {A}", f"teacher {B}"]
    assert pool_of(config, A) == [None, f"teacher {B}"]
    assert pool_of(config, A, B) == [None, None]


def test_a_replica_that_does_not_start_ends_the_start():
    with pytest.raises(ActorLost, match="teacher 1: cannot be reached"):
        pool_of(load(DEMO, ["teacher.replicas=2"]), 1)
