"""NCCL's part in weight updates, played over gloo where there is no GPU.

All else is the real thing: our senders and engines, and vLLM's packed transfer and its `nccl`
engine beneath them. `plugin` is a folder for `sys.path`: by what is in it vLLM loads this file in
every process of an engine.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore

from async_opd.runtime.actor_specs import ActorSpec, ActorSpecs

PLUGIN = Path(__file__).with_name("plugin")
_kept: list[object] = []  # who lets go of a gloo group waits for what is under way in it


class Communicator:
    """Behaves as PyNcclCommunicator, at its worst: where a member is gone whoever waits for it
    waits until this is destroyed, and then goes on as if nothing were, with garbage for what should
    have come; once destroyed it carries nothing, and does not say so."""

    gloo_s = 20.0  # gloo ends what hangs after so long, and nobody hears of it

    def __init__(self, store: PrefixStore, rank: int, world: int, device: int):
        from async_opd.roles.weight_sync.gloo import gloo_group

        tcp: Any = store.underlying_store
        self._group = gloo_group(tcp, rank=rank, world=world, timeout_s=self.gloo_s)
        self._destroyed = threading.Event()

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        from async_opd.roles.weight_sync.gloo import broadcast

        assert src == 0 and tensor.dtype == torch.uint8 and tensor.is_contiguous()
        if self._destroyed.is_set():
            return
        try:
            work = broadcast(self._group, tensor)
            while not work.is_completed() and not self._destroyed.is_set():
                time.sleep(5e-4)
            if work.is_completed():
                work.wait()
                return
        except RuntimeError:  # gloo's: NCCL would not have noticed
            self._destroyed.wait()
        tensor.fill_(255)

    def destroy(self) -> None:
        self._destroyed.set()
        _kept.append(self._group)


class Stream:
    """A CUDA stream to which nothing is put."""

    def synchronize(self) -> None: ...


def play(put: Callable[[object, str, object], None] = setattr) -> None:
    """Take NCCL's part in this process; `put` may be a monkeypatch's. vLLM's plugin entry point."""
    from vllm.distributed.weight_transfer import packed_tensor

    from async_opd.roles.weight_sync import nccl

    streams = tuple(Stream() for _ in range(packed_tensor.DEFAULT_PACKED_NUM_BUFFERS))
    put(packed_tensor, "_get_streams", lambda device, count: streams[:count])
    put(torch.accelerator, "current_device_index", lambda: 0)
    put(torch.accelerator, "synchronize", lambda *_: None)
    put(torch.cuda, "current_stream", lambda *_: Stream())
    put(nccl, "communicator", Communicator)


def learner(*args: Any) -> Any:
    """A learner's rank that sends over this."""
    from async_opd.roles.learner.engine import LearnerRank

    play()
    return LearnerRank(*args)


def generator(*args: Any) -> Any:
    """A generator whose engine receives over this, and which can be had to end."""
    from async_opd.roles.rollout.generator import RolloutGenerator

    class Doomed(RolloutGenerator):
        _doom: tuple[str, int] | None = None

        def doom(self, where: str, how: int) -> None:
            """Let the next call of `where` be met by that signal."""
            self._doom = where, how

        def _meet(self, where: str) -> None:
            if self._doom and self._doom[0] == where:
                os.kill(os.getpid(), self._doom[1])

        async def join_group(self, *args: Any) -> None:
            self._meet("join")
            await super().join_group(*args)

        async def update(self, *args: Any) -> None:
            self._meet("update")
            await super().update(*args)

    sys.path.append(f"{PLUGIN}")  # the engine's process has the same
    return Doomed(*args)


class Specs(ActorSpecs):
    """Those of a run over this."""

    def member(self, pool: str, index: int) -> ActorSpec:
        spec = super().member(pool, index)
        if pool != "generator":
            return spec
        return spec._replace(target="tests.nccl_over_gloo:generator")

    def learner_rank(self, rank: int) -> ActorSpec:
        return super().learner_rank(rank)._replace(target="tests.nccl_over_gloo:learner")
