"""The learner's own ranks on NCCL: one, or two on a card each."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from async_opd.core.role_settings import LearnerSettings
from async_opd.core.vocabulary import Ids
from async_opd.core.wire import Group, LearnerShare
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.engine import LearnerRank
from tests.gpu.place import GIB, Place, Record, Unfit, visible
from tests.gpu.student import PLAN_WITHIN, PROMPT, learner_config, plan
from tests.roles.learner.trajectories import trajectory

HOST = "127.0.0.1"
STEPS = 3


def train(place: Place, record: Record, ranks: int = 1, **settings) -> None:
    """Three steps of ZeRO, on as many cards as there are `ranks`: they are finite and move the
    weights, memory is within a tenth of what `async-opd plan` counts, and the weights leave
    whole."""
    settings |= {"ranks": ranks, "trajectories_per_step": ranks}
    planned = plan(place, checkpointing=True, **settings).total / GIB
    if place.device == "cuda" and planned > 0.9 * place.card_gib():
        raise Unfit(f"needs {planned:.0f} GiB by plan, the card has {place.card_gib():.0f}")
    model = saved(place.folder / "student", place.large, place.device)
    rank = learner_rank(place, model, **settings)
    address = rank.listen(HOST)
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.ranks"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible(number, 1)},
            stdin=subprocess.PIPE,
            text=True,
        )
        for number in range(1, ranks)
    ]
    try:
        for number, other in enumerate(others, 1):
            assert other.stdin is not None
            json.dump([number, place.device, place.tiny, address, model, settings], other.stdin)
            other.stdin.close()
        started(rank, address)
        peak = three_steps(place, rank, 0, partial(record, plan_gib=planned))
        assert [other.wait() for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
    assert place.device == "cpu" or abs(peak / planned - 1) <= PLAN_WITHIN, (
        f"{peak:.2f} GiB, by plan {planned:.2f}"
    )


def three_steps(place: Place, rank: LearnerRank, number: int, record: Record) -> float:
    """Have that rank train one micro-batch of its own a step, and leave the others behind the last;
    returns its peak in GiB. All ranks do the same at once."""
    parts = place.lengths("even")
    members = [
        trajectory(PROMPT, [(0, n - PROMPT)], id=f"{i}#0", seed=i + number * len(parts))
        for i, n in enumerate(parts)
    ]
    share = LearnerShare(
        (tuple((i, 0) for i in range(len(members))),), tuple(m.verdicts for m in members)
    )
    groups = tuple(Group(prompt=m.prompt, rollouts=(m.rollout,)) for m in members)
    scores = tuple((m.scores,) for m in members)
    before = rank.logprobs(members[0].prompt.ids, members[0].rollout.ids)
    for step in range(1, STEPS + 1):
        place.synchronize()
        place.empty()
        began = time.perf_counter()
        result = rank.step(share, groups=groups, scores=scores)
        place.synchronize()
        record(
            f"step {step}",
            seconds=time.perf_counter() - began,
            peak_gib=place.peak_gib(),
            loss=result.metrics["loss"],
            grad_norm=result.metrics["grad_norm"],
        )
    peak = place.peak_gib()
    after = rank.logprobs(members[0].prompt.ids, members[0].rollout.ids)
    sent = [tuple(weight.shape) for weight in rank._weights.tensors()]
    dist.barrier()  # rank 0 holds the store
    dist.destroy_process_group()
    assert sent == list(rank.weight_layout().shapes)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0, "the weights stood still"
    return peak


def saved(folder: Path, shape: dict, device: str) -> str:
    """Save a model of random weights, without a tokenizer; returns where."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    return f"{folder}"


def learner_rank(
    place: Place,
    model: str,
    backend: str = "gloo",
    number: int = 0,
    vocabulary: Ids | None = None,
    **settings,
) -> LearnerRank:
    """Make the rank of that number of a learner of `model`, whose log-probs are over
    `vocabulary`, or all of its head."""
    return LearnerRank(
        number,
        LearnerSettings(
            model=model,
            temperature=1.0,
            steps=1000,
            max_lag_steps=1000,
            stale="mask",
            truncated="train",
            max_new_tokens=place.tokens,
            seed=0,
            backend=backend,
            bucket_bytes=256 * 2**20,
            sync_s=60.0,
            timeout_s=60.0,
            vocabulary=vocabulary,
        ),
        learner_config(place, **settings),
        Opd(),
    )


def started(rank: LearnerRank, address: str) -> LearnerRank:
    """Have a rank join the others at `address`, where rank 0 listens, and load the student."""
    began = time.perf_counter()
    rank.start(address)
    print(f"the rank started in {time.perf_counter() - began:.1f} s", flush=True)
    return rank


if __name__ == "__main__":
    rank_number, device, tiny, meeting, student, chosen = json.load(sys.stdin)
    here = Place(device, tiny, Path())
    one = started(learner_rank(here, student, number=rank_number, **chosen), meeting)
    three_steps(here, one, rank_number, lambda *_, **__: None)
