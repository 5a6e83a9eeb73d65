"""The learner's own rank on NCCL, in a world of one."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare
from async_opd.objectives.opd import Opd
from async_opd.roles.learner.engine import LearnerRank
from tests.gpu.place import GIB, Place, Record, Unfit
from tests.gpu.student import PLAN_WITHIN, PROMPT, learner_config, plan
from tests.roles.learner.trajectories import trajectory

STEPS = 3


def train(place: Place, record: Record, **settings) -> None:
    """Three steps of ZeRO: they are finite and move the weights, memory is within a tenth of what
    `async-opd plan` counts, and the weights leave whole."""
    planned = plan(place, checkpointing=True, **settings).total / GIB
    if place.device == "cuda" and planned > 0.9 * place.card_gib():
        raise Unfit(f"needs {planned:.0f} GiB by plan, the card has {place.card_gib():.0f}")
    model = saved(place.folder / "student", place.large, place.device)
    rank = learner_rank(place, model, **settings)
    parts = place.lengths("even")
    members = [
        trajectory(PROMPT, [(0, n - PROMPT)], id=f"{i}#0", seed=i) for i, n in enumerate(parts)
    ]
    share = LearnerShare(
        (tuple((i, 0) for i in range(len(members))),), tuple(m.verdicts for m in members)
    )
    groups = tuple(Group(prompt=m.prompt, rollouts=(m.rollout,)) for m in members)
    scores = tuple((m.scores,) for m in members)
    before = rank.logprobs(members[0].prompt.ids, members[0].rollout.ids)
    for number in range(1, STEPS + 1):
        place.synchronize()
        place.empty()
        began = time.perf_counter()
        result = rank.step(share, groups=groups, scores=scores)
        place.synchronize()
        record(
            f"step {number}",
            seconds=time.perf_counter() - began,
            peak_gib=place.peak_gib(),
            plan_gib=planned,
            loss=result.metrics["loss"],
            grad_norm=result.metrics["grad_norm"],
        )
    peak = place.peak_gib()
    after = rank.logprobs(members[0].prompt.ids, members[0].rollout.ids)
    sent = [tuple(weight.shape) for weight in rank._weights.tensors()]
    dist.destroy_process_group()
    assert sent == list(rank.weight_layout().shapes)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0, "the weights stood still"
    assert place.device == "cpu" or abs(peak / planned - 1) <= PLAN_WITHIN, (
        f"{peak:.2f} GiB, by plan {planned:.2f}"
    )


def saved(folder: Path, shape: dict, device: str) -> str:
    """Save a model of random weights, without a tokenizer; returns where."""
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.bfloat16)
    lm.save_pretrained(folder)
    return f"{folder}"


def learner_rank(place: Place, model: str, backend: str = "gloo", **settings) -> LearnerRank:
    """Start the only rank of a learner of `model`."""
    rank = LearnerRank(
        0,
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
        ),
        learner_config(place, **settings),
        Opd(),
    )
    began = time.perf_counter()
    rank.start(rank.listen("127.0.0.1"))
    print(f"the rank started in {time.perf_counter() - began:.1f} s", flush=True)
    return rank
