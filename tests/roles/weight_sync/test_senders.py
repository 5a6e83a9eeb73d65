import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.profiler import profile

from async_opd.roles.weight_sync.gloo import TensorMeta, broadcast, buckets, gloo_group, join_store
from async_opd.roles.weight_sync.sender import SENDERS, GlooSender

HOST, BUCKET = "127.0.0.1", 40_000


@pytest.fixture
def wire():
    """A sender, and a function that runs a send beside a receiver and gives what arrived."""
    sender = GlooSender(HOST, bucket_bytes=BUCKET, timeout_s=10.0)
    with ThreadPoolExecutor(1) as pool:
        store = join_store(HOST, sender.port, timeout_s=10.0)
        joined = pool.submit(gloo_group, store, rank=1, world=2, timeout_s=10.0)
        sender.join(2)
        group = joined.result()

        def receive(described):
            flats = [torch.empty(sum(m.nbytes for m in b) // 4) for b in buckets(described, BUCKET)]
            for flat in flats:
                broadcast(group, flat).wait()
            return torch.cat(flats)

        def run(described, send):
            arrived = pool.submit(receive, described)
            send()
            return arrived.result()

        yield sender, run


def model(count):
    """`count` weights of 8,000 bytes."""
    described = [TensorMeta(str(i), "float32", (40, 50)) for i in range(count)]
    return described, [torch.full((40, 50), float(i)) for i in range(count)]


@pytest.mark.parametrize("backend", SENDERS)
def test_the_port_that_the_members_are_told_is_the_senders_own(backend):
    sender = SENDERS[backend](HOST, bucket_bytes=BUCKET, timeout_s=10.0)
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind((HOST, sender.group(1, 2).port))


def test_every_weight_arrives_in_order_and_again_after_it_moved(wire):
    sender, run = wire
    described, weights = model(23)
    for _ in range(2):
        got = run(described, lambda: sender.send(described, weights))
        assert torch.equal(got, torch.cat([w.flatten() for w in weights]))
        for weight in weights:
            weight.mul_(-3).add_(1)


def test_a_weight_larger_than_a_bucket_goes_alone(wire):
    sender, run = wire
    shapes = dict(a=(3,), b=(20_000,), c=())
    described = [TensorMeta(name, "float32", shape) for name, shape in shapes.items()]
    weights = [torch.ones(3), torch.arange(20_000.0), torch.tensor(7.0)]
    got = run(described, lambda: sender.send(described, weights))
    assert torch.equal(got, torch.cat([w.flatten() for w in weights]))


class Watched:
    """A broadcast that says when it starts and when it is waited for."""

    def __init__(self, log, group, flat):
        self._number, self._log, self._work = (
            sum("start" in line for line in log),
            log,
            broadcast(group, flat),
        )
        log.append(f"start {self._number}")

    def wait(self):
        self._log.append(f"wait {self._number}")
        self._work.wait()


def test_the_next_bucket_is_gathered_while_one_travels(wire, monkeypatch):
    sender, run = wire
    described, weights = model(20)  # four buckets of five
    log = []
    monkeypatch.setattr(
        "async_opd.roles.weight_sync.sender.broadcast", lambda *args: Watched(log, *args)
    )

    def gathered():
        for at, weight in enumerate(weights):
            log.extend([f"gather {at // 5}"] * (at % 5 == 0))
            yield weight

    run(described, lambda: sender.send(described, gathered()))
    assert log == [
        *("gather 0", "start 0", "gather 1", "start 1", "wait 0", "gather 2", "start 2"),
        *("wait 1", "gather 3", "start 3", "wait 2", "wait 3"),
    ]


def test_a_send_adds_two_buckets_of_memory_however_large_the_model(wire):
    sender, run = wire
    described, weights = model(400)  # 3.2 MB in 80 buckets
    measured = []

    def send():
        with profile(profile_memory=True) as seen:
            sender.send(described, weights)
        measured.extend(
            e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
        )

    run(described, send)
    live = peak = 0
    for change in measured:
        live += change
        peak = max(peak, live)
    assert 2 * BUCKET <= peak < 2.1 * BUCKET
