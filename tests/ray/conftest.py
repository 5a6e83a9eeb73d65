"""Real actors on a real local cluster: each test module starts what it needs once."""

from contextlib import asynccontextmanager

from transformers import AutoTokenizer

from async_opd.config.load import load
from async_opd.config.schema import Config
from async_opd.core.vocabulary import Tokens, runs
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.launch.readings import views
from async_opd.launch.toy_models import resolve_toy
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.runtime.cluster import Cluster
from tests.simulated.runs import replica


def demo_config(tmp_path, *overrides: str) -> Config:
    """The demo with its shipped models, its data in `tmp_path`, and `overrides`."""
    return resolve_toy(load("configs/demo.toml", [f"run.dir={tmp_path}/run", *overrides]), tmp_path)


@asynccontextmanager
async def running(
    config: Config, eos_ids: tuple[int, ...] = (1,), stops: tuple[int | str, ...] = ()
):
    """(roles, publisher, prompts) with version 0 published. No `eos_ids`: every response has full
    length."""
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    prompts = iter(PromptSource(config.data, tokenizer, seed=0, views=views(config, tokenizer)))
    tokens = Tokens(student=runs(tokenizer.get_vocab().values()), eos_ids=eos_ids, stops=stops)
    with Cluster(config, tokens=tokens, tokenizer=tokenizer.backend_tokenizer) as cluster:
        roles = await cluster.roles()
        publisher = WeightPublisher(
            replica(roles.learner),
            ReplicaPool("generator", roles.generators),
            parity_every=1,
            tolerance=1e-4,
        )
        await publisher.publish(0, admit=lambda: None)
        yield roles, publisher, prompts
