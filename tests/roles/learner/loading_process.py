"""One rank that loads a sharded student and says what it got, and what that cost. Not a test:
`test_loading.py` starts `main`."""

import re
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from async_opd.core.role_settings import LearnerSettings
from async_opd.objectives.opd import Opd
from async_opd.roles.learner import engine
from async_opd.roles.learner.config import LearnerConfig
from tests.roles.learner.rank_process import rendezvous


def anonymous() -> int:
    """Bytes that this process holds and no file does."""
    kib = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib[1]) * 1024


def main(rank: int, meeting: str, model: str, out: str) -> None:
    learner = engine.LearnerRank(
        rank,
        LearnerSettings(
            model=model,
            temperature=1.0,
            steps=2,
            max_lag_steps=1,
            stale="mask",
            truncated="train",
            max_new_tokens=64,
            seed=0,
            backend="gloo",
            bucket_bytes=1 << 20,
            sync_s=60.0,
            timeout_s=60.0,
        ),
        LearnerConfig(trajectories_per_step=2, lr=1e-3, ranks=2, zero_stage=3),
        Opd(),
    )
    most, shard, begun = 0, engine._shard, 0

    def weighed(*args) -> None:
        nonlocal most, begun
        most = max(most, anonymous() - begun) if begun else 0
        shard(*args)
        begun = begun or anonymous()  # with what the first weight has DeepSpeed and gloo make

    engine._shard = weighed
    learner.start(rendezvous(learner, rank, Path(meeting)))
    held = {name: p.numel() for name, p in learner._lm.named_parameters()}
    weights = {}
    for name, weight in learner._lm.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([weight]):
            weights[name] = weight.detach().clone()
    described = [(meta.name, tuple(meta.shape)) for meta in learner._weights.described]
    buffers = dict(learner._lm.named_buffers())
    torch.save(dict(most=most, held=held, weights=weights, sent=described, buffers=buffers), out)
    dist.barrier()
    dist.destroy_process_group()
