"""What reaches our sockets from strangers: the group forms all the same, or fails by name within its timeout."""

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from async_opd.collective import broadcast, free_port, gloo_group, tcp_store

HOST, TIMEOUT_S = "127.0.0.1", 60.0
HELLO = struct.pack("<BI", 0, 0x3C85F7CE)  # torch's: query VALIDATE and its magic number; SET is 1
NASTY = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64,
    "a pickle": b"\x80\x04cposix\nsystem\n(S'touch /tmp/was-run'\ntR.",
    "a key of 2^62 bytes": HELLO + struct.pack("<BQ", 1, 2**62) + b"x" * 64,
    "a value of 2^62 bytes": HELLO + struct.pack("<BQ", 1, 3) + b"key" + struct.pack("<Q", 2**62) + b"x" * 64,
    "nothing": b"",
}


def stranger(port: int, message: bytes) -> socket.socket:
    """A connection that has said `message` and stays open."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            connection = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    connection.sendall(message)
    return connection


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_weight_group_forms_and_carries_weights_whatever_a_stranger_sends(message):
    port = free_port(HOST)

    def member(rank):
        return gloo_group(HOST, port, rank=rank, world=2, timeout_s=TIMEOUT_S)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(member, 0)
        early = stranger(port, message)
        time.sleep(0.1)
        second = pool.submit(member, 1)
        during = stranger(port, message)
        groups = [first.result(), second.result()]
        later = stranger(port, message)
        flats = [torch.arange(5.0), torch.zeros(5)]
        for work in [broadcast(group, flat) for group, flat in zip(groups, flats, strict=True)]:
            work.wait()
    assert torch.equal(flats[1], torch.arange(5.0))
    for connection in (early, during, later):
        connection.close()


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_group_whose_member_is_only_a_stranger_fails_by_name_within_its_timeout(message):
    port, started = free_port(HOST), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(gloo_group, HOST, port, rank=0, world=2, timeout_s=0.5)
        with stranger(port, message), pytest.raises(RuntimeError):
            alone.result()
    assert time.monotonic() - started < TIMEOUT_S


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    return {tuple(c.laddr) for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_stranger_at_the_port_that_carries_the_weights_is_ignored(message):
    port, before = free_port(HOST), listening()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gloo_group, HOST, port, rank=0, world=2, timeout_s=TIMEOUT_S)
        while len(listening() - before) < 2:  # the store and gloo
            assert not first.done()
            time.sleep(0.01)
        (gloo,) = {own for _, own in listening() - before} - {port}
        with stranger(gloo, message), stranger(gloo, b"\xff" * 4096):
            second = pool.submit(gloo_group, HOST, port, rank=1, world=2, timeout_s=TIMEOUT_S)
            flats = [torch.arange(5.0), torch.zeros(5)]
            works = [broadcast(f.result(), flat) for f, flat in zip((first, second), flats, strict=True)]
            for work in works:
                work.wait()
    assert torch.equal(flats[1], torch.arange(5.0))


def test_we_listen_on_the_address_of_the_host_alone():
    port, before = free_port(HOST), listening()
    store = tcp_store(HOST, port, rank=0, world=1, timeout_s=TIMEOUT_S)
    group = gloo_group(HOST, free_port(HOST), rank=0, world=1, timeout_s=TIMEOUT_S)
    ours = listening() - before
    assert (HOST, port) in ours
    assert {address for address, _ in ours} == {HOST}
    del store, group
