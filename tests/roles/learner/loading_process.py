"""One rank that loads a sharded student and says what it got, and what that cost. Not a test:
`test_loading.py` starts `main`."""

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from async_opd.core.errors import DataError
from async_opd.core.role_settings import LearnerSettings
from async_opd.objectives.opd import Opd
from async_opd.roles.learner import engine
from async_opd.roles.learner.config import LearnerConfig
from tests.roles.learner.rank_process import rendezvous


def mapped(weight: torch.Tensor) -> bool:
    """Tell whether it lies in a file, whose pages become a rank's own once they are written."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= weight.data_ptr() < end:
            return line.endswith(".safetensors")
    return False


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
    most, parts, shard = 0, 0, engine._shard
    in_files = []
    whole: list[tuple[StorageWeakRef, int]] = []

    def weighed(settings: dict, weight: torch.nn.Parameter) -> None:
        """Count weights that are still whole, and parts of the others. What malloc and gloo keep of
        what was freed is not the loader's."""
        nonlocal most, parts
        whole.append((StorageWeakRef(weight.untyped_storage()), weight.nbytes))
        in_files.append(mapped(weight))
        most = max(most, parts + sum(size for alive, size in whole if not alive.expired()))
        shard(settings, weight)
        parts += weight.ds_tensor.untyped_storage().nbytes()

    engine._shard = weighed
    try:
        learner.start(rendezvous(learner, rank, Path(meeting)))
    except DataError as e:
        torch.save(f"{e}", out)
        dist.barrier()
        dist.destroy_process_group()
        return
    held = {name: p.numel() for name, p in learner._lm.named_parameters()}
    weights = {}
    for name, weight in learner._lm.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([weight]):
            weights[name] = weight.detach().clone()
    described = [(meta.name, tuple(meta.shape)) for meta in learner._weights.described]
    buffers = dict(learner._lm.named_buffers())
    torch.save(
        dict(
            most=most,
            held=held,
            weights=weights,
            sent=described,
            buffers=buffers,
            in_files=in_files,
        ),
        out,
    )
    dist.barrier()
    dist.destroy_process_group()
