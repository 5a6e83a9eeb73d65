"""A send of weights whose other end is gone: it comes back, and another group forms in the same
process."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from async_opd.roles.weight_sync.gloo import TensorMeta, broadcast, buckets, gloo_group, join_store
from async_opd.roles.weight_sync.nccl import NcclGroup, load_library
from async_opd.roles.weight_sync.sender import SENDERS, Sender
from tests.gpu.place import Place, Record, visible

BUCKET = 2**24  # several weights of an update each
HOST = "127.0.0.1"
JOIN_S = 60.0  # that the other end waits
ABORT_S = 5.0  # within which an aborted send must come back


def lost(place: Place, record: Record, backend: str) -> None:
    """A whole update arrives. The other end of the next is killed, and the group left, as the run
    does when it hears of that: the send comes back within seconds. In a new group it hangs, which
    nobody hears of: the send comes back within the timeout. Over nccl ends of two cards."""
    timeout_s = 4.0 if place.tiny else 20.0  # the second is sync.timeout_s's own
    described = layout(4 if place.tiny else 64)
    weights = [
        torch.full(meta.shape, 1.0 + i, dtype=torch.bfloat16, device=place.device)
        for i, meta in enumerate(described)
    ]
    cards = {"CUDA_VISIBLE_DEVICES": visible(1, 1)} if backend == "nccl" else {}
    stream = torch.cuda.current_stream() if place.device == "cuda" else None
    for how, allowed_s in ((signal.SIGKILL, ABORT_S), (signal.SIGSTOP, timeout_s + ABORT_S)):
        sender = SENDERS[backend](HOST, bucket_bytes=BUCKET, timeout_s=timeout_s)
        peer = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.peers", backend, f"{sender.port}", f"{len(weights)}"],
            env=os.environ | cards,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            said(peer, "ready")  # it has imported what takes longer than a join may
            sender.join(2)
            if stream:
                assert torch.cuda.current_stream() == stream, "the join left another stream"
            sender.send(described, weights)
            arrived = said(peer, "arrived")
            assert arrived == [f"{1.0 + i}" for i in range(len(weights))], arrived
            seconds = cut_off(sender, (described, weights), peer, how, timeout_s + 2 * ABORT_S)
        finally:
            peer.kill()
            peer.wait()
        record(f"{backend}, {how.name}", seconds=seconds)
        assert seconds <= allowed_s, f"{how.name}: the send came back after {seconds:.1f} s"
        sender.leave()
    place.synchronize()  # the card is none the worse


def cut_off(
    sender: Sender,
    update: tuple[list[TensorMeta], list[Tensor]],
    peer: subprocess.Popen[str],
    how: signal.Signals,
    within_s: float,
) -> float:
    """Send an `update` that nobody takes, and signal the other end meanwhile; returns after how
    many seconds the send came back, with a RuntimeError."""
    ended: list[float] = []

    def sending() -> None:
        try:
            while True:  # the first may fit into buffers on its way
                sender.send(*update)
        except RuntimeError as e:
            print(f"the send ended: {e}", flush=True)
            ended.append(time.monotonic())

    thread = threading.Thread(target=sending, daemon=True)
    thread.start()
    time.sleep(1.0)
    assert not ended, "a send ended before its other end"
    began = time.monotonic()
    peer.send_signal(how)
    if how == signal.SIGKILL:
        sender.leave()
    thread.join(within_s)
    assert ended, f"the send still waits after {within_s:.0f} s"
    return ended[0] - began


def said(peer: subprocess.Popen[str], word: str) -> list[str]:
    """Wait for the line of the other end that begins with `word`; returns what follows in it."""
    assert peer.stdout is not None
    for line in peer.stdout:
        if line.startswith(word):
            return line.split()[1:]
    raise AssertionError(f"the other end ended with status {peer.wait()}, not {word}")


def layout(count: int) -> list[TensorMeta]:
    """So many weights of 4 MiB."""
    return [TensorMeta(f"{i}", "bfloat16", (2048, 1024)) for i in range(count)]


def stand_by(backend: str, port: int, described: list[TensorMeta]) -> None:
    """Join as the one worker of an engine, take one update, print the first number of each weight,
    and never take another."""
    if backend == "nccl":
        load_library()
    print("ready", flush=True)
    store = join_store(HOST, port, JOIN_S)
    forms, takes = {"gloo": (gloo_group, over_gloo), "nccl": (NcclGroup, over_nccl)}[backend]
    group = forms(store, rank=1, world=2, timeout_s=JOIN_S)
    arrived = takes(group, described)
    print("arrived", *arrived, flush=True)
    time.sleep(600)
    del group  # until then its connections are open


def over_gloo(group: ProcessGroupGloo, described: list[TensorMeta]) -> list[float]:
    """Take an update; returns the first number of each weight."""
    numbers: list[float] = []
    for bucket in buckets(described, BUCKET):
        sizes = [math.prod(meta.shape) for meta in bucket]
        flat = torch.empty(sum(sizes), dtype=torch.bfloat16)
        broadcast(group, flat).wait()
        numbers += [part[0].item() for part in flat.split(sizes)]
    return numbers


def over_nccl(group: NcclGroup, described: list[TensorMeta]) -> list[float]:
    """Take an update by vLLM's consumer; returns the first number of each weight."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

    numbers: list[float] = []
    with group.bounded():
        packed_nccl_broadcast_consumer(
            ((meta.name, (list(meta.shape), torch.bfloat16)) for meta in described),
            group,
            0,
            lambda items: numbers.extend(weight.flatten()[0].item() for _, weight in items),
            buffer_size_bytes=BUCKET,
        )
    return numbers


if __name__ == "__main__":
    stand_by(sys.argv[1], int(sys.argv[2]), layout(int(sys.argv[3])))
