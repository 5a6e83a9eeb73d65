"""Real actors on a real local cluster: each test module starts what it needs once."""

from contextlib import asynccontextmanager

import msgspec

from async_opd.actors import Cluster
from async_opd.config import Config, load
from async_opd.rollout.prompts import PromptSource
from async_opd.stream.publish import Publisher


def demo_config(tmp_path, *overrides: str, student: str | None = None) -> Config:
    """The demo with its shipped models and its data in `tmp_path`; `student` replaces the student."""
    from async_opd.run import _resolve_toy

    config = load("configs/demo.toml", [f"run.dir={tmp_path}", *overrides])
    config = _resolve_toy(config, tmp_path)
    return msgspec.structs.replace(config, student=msgspec.structs.replace(config.student, model=student or config.student.model))


@asynccontextmanager
async def running(config: Config):
    """(roles, publisher, prompts) with version 0 published."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    prompts = iter(PromptSource(config.data, tokenizer, seed=0))
    with Cluster(config, eos_ids=[1], vocabulary=len(tokenizer)) as cluster:
        roles = await cluster.roles()
        publisher = Publisher(roles.learner, roles.generators, parity_every=1, tolerance=1e-4)
        await publisher.connect()
        await publisher.publish(0, admit=lambda: None)
        yield roles, publisher, prompts
