"""A learner rank in a process of its own: what it holds between two steps, and the most it
allocates in one.

`python -m tests.tools.plan.learner_memory <json>` with the fields of `main`; prints bytes as JSON.
Not a test: `test_learner_memory.py` starts it.
"""

import gc
import json
import os
import sys

import torch

from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.engine import LearnerRank
from tests.roles.learner.trajectories import trajectory
from tests.tensor_memory import TensorMemory


def held() -> int:
    gc.collect()
    tensors = (
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)
    )
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main(model: str, settings: dict, tokens: list[int]) -> None:
    config = LearnerConfig(trajectories_per_step=1, lr=1e-4, **settings)
    learner = LearnerRank(
        0,
        LearnerSettings(
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
        ),
        config,
        Opd(),
    )
    learner.start(learner.listen("127.0.0.1"))

    def peak(length: int) -> int:
        one = trajectory(1, [(0, length - 1)])
        group = Group(prompt=one.prompt, rollouts=(one.rollout,))
        share = LearnerShare((((0, 0),),), (one.verdicts,))
        with TensorMemory() as memory:
            learner.step(share, groups=(group,), scores=((one.scores,),))
        return memory.most

    peak(tokens[0])  # which makes the optimizer's state
    print(json.dumps({"held": held(), "peaks": [peak(length) for length in tokens]}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
