"""A learner rank in a process of its own: what it holds between two steps, and the most it
allocates in one, of two micro-batches.

`python -m tests.tools.plan.learner_memory <json>` with the fields of `main`; prints bytes as JSON.
Not a test: `test_learner_memory.py` starts it.
"""

import gc
import json
import multiprocessing
import os
import sys

import torch

from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare
from async_opd.objectives.opd import Opd
from async_opd.roles.learner import engine
from async_opd.roles.learner.config import LearnerConfig
from tests.roles.learner.trajectories import trajectory
from tests.tensor_memory import TensorMemory


def held() -> int:
    gc.collect()
    tensors = (
        each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)
    )
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def as_on_a_card(reduced: int) -> None:
    """Have DeepSpeed reduce so few gradients at once that they do not hide the rest, and Adam work
    as it does on a card, all weights at once."""
    made = engine.deepspeed_config

    def changed(config: LearnerConfig, width: int) -> dict:
        settings = made(config, width)
        settings["zero_optimization"]["reduce_bucket_size"] = reduced
        params = settings["optimizer"]["params"]
        params["foreach"] = not params.get("fused")
        return settings

    engine.deepspeed_config = changed


def rank(number: int, job: dict, addresses, measured) -> None:
    """Measure one rank, and end its process."""
    config = LearnerConfig(lr=1e-4, **job["settings"])
    learner = engine.LearnerRank(
        number,
        LearnerSettings(
            model=job["model"],
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
    if number == 0:
        address = learner.listen("127.0.0.1")
        for _ in range(config.ranks - 1):
            addresses.put(address)
    else:
        address = addresses.get()
    learner.start(address)

    def peak(length: int) -> int:
        one = trajectory(1, [(0, length - 1)])
        group = Group(prompt=one.prompt, rollouts=(one.rollout,))
        share = LearnerShare((((0, 0),), ((0, 0),)), (one.verdicts,))
        with TensorMemory() as memory:
            learner.step(share, groups=(group,), scores=((one.scores,),))
        return memory.most

    peak(job["tokens"][0])  # which makes the optimizer's state
    between = held()
    peaks = [peak(length) for length in job["tokens"]]
    if number == 0:
        measured.send({"held": between, "peaks": peaks})
    torch.distributed.barrier()
    os._exit(0)


def main(model: str, cases: list[dict], tokens: list[int], reduced: int) -> None:
    """Measure rank 0 of each of `cases` of a learner's settings; ranks are forked, so that all is
    imported once."""
    as_on_a_card(reduced)
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    for settings in cases:
        addresses = fork.Queue()
        receiver, sender = fork.Pipe(duplex=False)
        job = dict(model=model, settings=settings, tokens=tokens)
        ranks = [
            fork.Process(target=rank, args=(number, job, addresses, sender))
            for number in range(settings["ranks"])
        ]
        for each in ranks:
            each.start()
        sender.close()
        print("measured", json.dumps(receiver.recv()), flush=True)
        for each in ranks:
            each.join()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
