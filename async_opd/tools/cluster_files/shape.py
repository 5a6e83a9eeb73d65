"""Nodes of a cluster for a config. Every number of a rendered file is one of these."""

import re
from dataclasses import dataclass
from math import ceil
from pathlib import PurePosixPath

from async_opd.config.schema import Config
from async_opd.core.errors import ConfigError
from async_opd.runtime.placement import place_on_alike, resource_requests

CPUS_A_GPU = 4  # its actor, the engine's process, and the threads of both; none is reserved
# of host memory, a rule of thumb: more for `learner.offload_optimizer` of a large model
GIB_A_GPU = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Nodes, all alike: the first is the head, and trains as the others do."""

    name: str  # of the run, as Kubernetes spells names
    nodes: int
    gpus: int  # of a node
    cpus: int
    memory_gib: int
    shm_gib: int  # Ray's object store, which takes 30 % of the memory, and what NCCL and vLLM share
    run_dir: str
    runs: str  # the folder it lies in
    shared: str  # the first folder of both: the disk that every node sees


def shape_of(config: Config, gpus_per_node: int) -> Shape:
    """Choose the fewest nodes of at most `gpus_per_node` that hold every role. Raises
    ConfigError."""
    run_dir = PurePosixPath(config.run.dir)
    if not run_dir.is_absolute() or len(run_dir.parts) < 3:
        raise ConfigError(
            f"run.dir = {config.run.dir!r}: must be absolute, on a disk that every node sees, such"
            " as /shared/runs/a"
        )
    requests = resource_requests(config, gpus=True)
    gpus = min(gpus_per_node, ceil(sum(request.count * request.gpus for request in requests)))
    largest = max(requests, key=lambda request: request.gpus)
    if largest.gpus > gpus:
        raise ConfigError(
            f"--gpus-per-node {gpus_per_node}: too few: {largest.role} asks for {largest.gpus:g} on"
            f" one node: lower {' or '.join(largest.settings)}"
        )
    memory = GIB_A_GPU * gpus
    return Shape(
        name=re.sub("[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")[:40] or "run",
        nodes=len(place_on_alike(requests, gpus)),
        gpus=gpus,
        cpus=CPUS_A_GPU * gpus + config.verify.workers,
        memory_gib=memory,
        shm_gib=memory // 2,
        run_dir=str(run_dir),
        runs=str(run_dir.parent),
        shared=str(PurePosixPath(*run_dir.parts[:2])),
    )
