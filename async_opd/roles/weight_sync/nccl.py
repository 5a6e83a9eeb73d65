"""A group that carries weights by NCCL, which by itself waits for a dead member for ever: here
every wait ends. Joined by both sides."""

import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] torch's stubs do not export it
    Store,  # pyright: ignore[reportPrivateImportUsage] nor this
)

from async_opd.core.aside import DaemonThread

GO = "go"  # key that rank 0 sets once all members are there


class Communicator(Protocol):
    """What `NcclGroup` needs of vLLM's PyNcclCommunicator. One that is destroyed carries nothing,
    and does not say so."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None: ...
    def destroy(self) -> None: ...


def meet(store: Store, *, rank: int, world: int, timeout_s: float) -> None:
    """Wait until all members of a group are in `store`; rank 0 says when. Raises RuntimeError
    naming the ranks that stay away, after `timeout_s` on each side."""
    ends = time.monotonic() + timeout_s
    store.set(f"here/{rank}", "")
    if rank:
        try:
            store.wait([GO], timedelta(seconds=timeout_s))
        except RuntimeError as e:
            store.set(f"gone/{rank}", "")  # nobody is to count on this one
            raise RuntimeError(f"not all of {world} members came within {timeout_s:g} s") from e
        return
    for other in range(world):
        try:
            left = timedelta(seconds=max(ends - time.monotonic(), 1e-3))
            store.wait([f"here/{other}"], left)
        except RuntimeError:
            break
    missing = [other for other in range(world) if not store.check([f"here/{other}"])]
    if missing:
        raise RuntimeError(f"rank {missing} of {world} did not come within {timeout_s:g} s")
    gone = [other for other in range(world) if store.check([f"gone/{other}"])]
    if gone:
        raise RuntimeError(f"rank {gone} of {world} did not wait for the others")
    store.set(GO, "")


def load_library() -> None:
    """Import what a communicator is made of: up to half a minute where the disk is cold."""
    # one weight may be larger than a bucket
    warnings.filterwarnings("ignore", "Tensor .* exceeds buffer_size_bytes")
    for name in ("device_communicators.pynccl", "weight_transfer.packed_tensor"):
        import_module(f"vllm.distributed.{name}")


def communicator(store: Store, rank: int, world: int, device: int) -> Communicator:
    """Form a communicator between members who meet in `store`. Has no bound; raises RuntimeError
    where there is no NCCL."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    group = StatelessProcessGroup(rank=rank, world_size=world, store=store)
    with unpinned_nccl_env():
        made = PyNcclCommunicator(group, device=device)
    if made.disabled:
        raise RuntimeError("vLLM finds no NCCL library, or VLLM_DISABLE_PYNCCL is set")
    return made


class NcclGroup:
    """A communicator whose every use ends within `timeout_s`: it is aborted then, and whoever waits
    in it gets a RuntimeError. Stands where vLLM's packed transfer and its engine expect a
    PyNcclCommunicator."""

    def __init__(self, store: Store, *, rank: int, world: int, timeout_s: float):
        """Join the `world` members that meet in `store`, which rank 0 has opened. Raises
        RuntimeError where they do not within `timeout_s`.

        The communicator is formed in a thread of its own: there is no other way out of
        `ncclCommInitRank`, and vLLM gives the thread that forms one another current stream.
        """
        self._timeout_s = timeout_s
        self._ended = ""  # why
        self._destroying, self._destroyed = threading.Lock(), False
        ends = time.monotonic() + timeout_s
        meet(store, rank=rank, world=world, timeout_s=timeout_s)
        thread, device = DaemonThread("nccl"), torch.accelerator.current_device_index()
        forming = thread.submit(communicator, PrefixStore("nccl", store), rank, world, device)
        thread.shutdown()
        try:
            self._communicator = forming.result(ends - time.monotonic())
        except TimeoutError:
            forming.add_done_callback(_destroy)
            raise RuntimeError(
                f"all of {world} members came, but NCCL connects them not within {timeout_s:g} s"
            ) from None

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Start a broadcast on `stream`, or on the current one. Raises RuntimeError where the group
        has ended."""
        self._refuse_ended()
        self._communicator.broadcast(tensor, src, stream)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """End the group when what goes on inside takes longer than its time. Raises RuntimeError,
        whether or not anybody inside has noticed."""
        why = f"it was aborted after {self._timeout_s:g} s"
        timer = threading.Timer(self._timeout_s, self.destroy, [why])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        self._refuse_ended()

    def destroy(self, why: str = "it was left") -> None:
        """End the group, from any thread: `ncclCommAbort`. Returns when that has, five seconds at
        most."""
        self._ended = self._ended or why
        with self._destroying:
            if not self._destroyed:
                self._destroyed = True
                self._communicator.destroy()

    def _refuse_ended(self) -> None:
        if self._ended:
            raise RuntimeError(f"the NCCL group is no more: {self._ended}")


def _destroy(forming: Future[Communicator]) -> None:
    """End what was formed too late."""
    if not forming.exception():
        forming.result().destroy()
