"""What only two cards can show of an update by nccl: `ncclCommAbort` ends a broadcast whose peer
is gone or hangs, and another group forms afterwards in the same process."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from async_opd.roles.weight_sync.gloo import TensorMeta, join_store
from async_opd.roles.weight_sync.nccl import NcclGroup, load_library
from async_opd.roles.weight_sync.sender import NcclSender

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two cards"),
]
TIMEOUT_S = 10.0
WEIGHTS = 64  # of 4 MiB
DESCRIBED = [TensorMeta(f"w{n}", "bfloat16", (1 << 21,)) for n in range(WEIGHTS)]


def receiver(port: int, dies: int, ready, arrived) -> None:
    """Join on the second card and receive once; with `dies`, meet the second update by that
    signal."""
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

    torch.cuda.set_device(1)
    load_library()
    ready.set()
    store = join_store("127.0.0.1", port, 60.0)
    group = NcclGroup(store, rank=1, world=2, timeout_s=TIMEOUT_S)
    sums: list[float] = []
    with group.bounded():
        packed_nccl_broadcast_consumer(
            ((m.name, (list(m.shape), torch.bfloat16)) for m in DESCRIBED),
            group,
            0,
            lambda items: sums.extend(weight.double().sum().item() for _, weight in items),
            buffer_size_bytes=1 << 24,
            device="cuda:1",
        )
    arrived.put(sums)
    if dies:
        os.kill(os.getpid(), dies)


def update(how: int) -> tuple[NcclSender, list[torch.Tensor], multiprocessing.Process]:
    """A whole update to a new receiver, checked; the receiver then goes by that signal."""
    spawn = multiprocessing.get_context("spawn")
    ready, arrived = spawn.Event(), spawn.Queue()
    sender = NcclSender("127.0.0.1", bucket_bytes=1 << 24, timeout_s=TIMEOUT_S)
    process = spawn.Process(target=receiver, args=(sender.port, how, ready, arrived))
    process.start()
    assert ready.wait(60)
    sender.join(2)
    weights = [
        torch.full(meta.shape, n, dtype=torch.bfloat16, device="cuda:0")
        for n, meta in enumerate(DESCRIBED)
    ]
    sender.send(DESCRIBED, weights)
    assert arrived.get(timeout=60) == [float(n << 21) for n in range(WEIGHTS)]
    return sender, weights, process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_broadcast_whose_peer_is_gone_is_aborted_and_another_group_forms(how):
    load_library()
    before = torch.cuda.current_stream()
    for _ in range(2):
        sender, weights, process = update(int(how))
        assert torch.cuda.current_stream() == before  # the join left it as it was
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            for _ in range(100):
                sender.send(DESCRIBED, weights)
        assert time.monotonic() - started < TIMEOUT_S + 10
        sender.leave()
        process.kill()
        process.join()
    assert torch.ones(8, device="cuda:0").sum().item() == 8  # the device is none the worse
