"""A learner rank in a process of its own: what it holds between two steps, and the most it
allocates in one.

`python -m tests.tools.plan.learner_memory <json>` with the fields of `main`; prints bytes as JSON.
Not a test: `test_learner_memory.py` starts it.
"""

import gc
import json
import os
import sys

import numpy as np
import torch

from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Prompt, Rollout, Scores, Span, Verdict
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.engine import LearnerRank
from tests.tensor_memory import TensorMemory


def held() -> int:
    gc.collect()
    tensors = (
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)
    )
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak(work) -> int:
    with TensorMemory() as memory:
        work()
    return memory.most


def main(model: str, settings: dict, tokens: list[int]) -> None:
    learner_settings = LearnerSettings(
        model=model,
        temperature=1.0,
        steps=10,
        max_lag_steps=9,
        stale="mask",
        truncated="train",
        max_new_tokens=4096,
        seed=0,
        backend="gloo",
        bucket_bytes=2**20,
        sync_s=60.0,
        timeout_s=60.0,
    )
    config = LearnerConfig(trajectories_per_step=1, lr=1e-4, **settings)
    learner = LearnerRank(0, learner_settings, config, Opd())
    learner.start(learner.listen("127.0.0.1"))

    def step(length: int) -> None:
        ids = np.zeros(length, np.int32)
        spans = (Span(version=0, start=0, end=length - 1),)
        rollout = Rollout(
            id="0#0",
            ids=ids[1:],
            behaviour_logp=-np.ones(length - 1, np.float32),
            spans=spans,
            truncated=False,
        )
        group = Group(prompt=Prompt(id="0", ids=ids[:1], answer=""), rollouts=(rollout,))
        scores = Scores(id="0#0", sampled_logp=-2 * np.ones(length - 1, np.float32))
        share = LearnerShare((((0, 0),),), ((Verdict(id="0#0", correct=True),),))
        learner.step(share, groups=(group,), scores=((scores,),))

    step(tokens[0])  # which makes the optimizer's state
    print(
        json.dumps(
            {
                "held": held(),
                "peaks": [peak(lambda length=length: step(length)) for length in tokens],
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
