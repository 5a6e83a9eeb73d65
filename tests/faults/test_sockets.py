"""What reaches our sockets from strangers: the group forms all the same, or fails by name within
its timeout."""

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from async_opd.roles.weight_sync.gloo import broadcast, gloo_group, join_store, open_store

HOST, TIMEOUT_S = "127.0.0.1", 60.0
HELLO = struct.pack("<BI", 0, 0x3C85F7CE)  # torch's: query VALIDATE and its magic number; SET is 1
NASTY = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64,
    "a pickle": b"\x80\x04cposix\nsystem\n(S'touch /tmp/was-run'\ntR.",
    "a key of 2^62 bytes": HELLO + struct.pack("<BQ", 1, 2**62) + b"x" * 64,
    "a value of 2^62 bytes": HELLO
    + struct.pack("<BQ", 1, 3)
    + b"key"
    + struct.pack("<Q", 2**62)
    + b"x" * 64,
    "nothing": b"",
}


def stranger(port: int, message: bytes) -> socket.socket:
    """A connection that has said `message` and stays open."""
    connection = socket.create_connection((HOST, port), timeout=TIMEOUT_S)
    connection.sendall(message)
    return connection


def first(store: TCPStore, timeout_s: float = TIMEOUT_S) -> ProcessGroupGloo:
    """The group of two that meets in `store`, as the one who opened it sees it."""
    return gloo_group(store, rank=0, world=2, timeout_s=timeout_s)


def second(store: TCPStore) -> ProcessGroupGloo:
    """The same, as the other member sees it."""
    return gloo_group(join_store(HOST, store.port, TIMEOUT_S), rank=1, world=2, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_weight_group_forms_and_carries_weights_whatever_a_stranger_sends(message):
    store = open_store(HOST, TIMEOUT_S)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, store)
        early = stranger(store.port, message)
        time.sleep(0.1)
        other = pool.submit(second, store)
        during = stranger(store.port, message)
        groups = [one.result(), other.result()]
        later = stranger(store.port, message)
        flats = [torch.arange(5.0), torch.zeros(5)]
        for work in [broadcast(group, flat) for group, flat in zip(groups, flats, strict=True)]:
            work.wait()
    assert torch.equal(flats[1], torch.arange(5.0))
    for connection in (early, during, later):
        connection.close()


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_group_whose_member_is_only_a_stranger_fails_by_name_within_its_timeout(message):
    store, started = open_store(HOST, 0.25), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(first, store, 0.25)
        with stranger(store.port, message), pytest.raises(RuntimeError):
            alone.result()
    assert time.monotonic() - started < TIMEOUT_S


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    return {
        tuple(c.laddr)
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("message", NASTY.values(), ids=NASTY)
def test_a_stranger_at_the_port_that_carries_the_weights_is_ignored(message):
    store = open_store(HOST, TIMEOUT_S)
    with ThreadPoolExecutor(2) as pool:
        before = listening()
        one = pool.submit(first, store)
        while not (opened := listening() - before):
            assert not one.done()
            time.sleep(0.01)
        ((_, gloo),) = opened
        with stranger(gloo, message), stranger(gloo, b"\xff" * 4096):
            other = pool.submit(second, store)
            flats = [torch.arange(5.0), torch.zeros(5)]
            works = [
                broadcast(f.result(), flat) for f, flat in zip((one, other), flats, strict=True)
            ]
            for work in works:
                work.wait()
    assert torch.equal(flats[1], torch.arange(5.0))


def test_we_listen_on_the_address_of_the_host_alone():
    before = listening()
    store = open_store(HOST, TIMEOUT_S)
    assert (HOST, store.port) in listening() - before
    group = gloo_group(store, rank=0, world=1, timeout_s=TIMEOUT_S)
    assert {address for address, _ in listening() - before} == {HOST}
    del group
