import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_opd.collective import TensorMeta, broadcast, buckets, free_port, gloo_group

HOST = "127.0.0.1"
SOON_S = 30.0  # behind a timeout of a second or less, on a busy machine; torch's own timeouts are minutes
dtypes = st.sampled_from(["float32", "bfloat16", "int64"])
metas = st.lists(st.builds(TensorMeta, name=st.sampled_from("abc"), dtype=dtypes, shape=st.tuples(st.integers(0, 40))))


@given(metas=metas, bucket_bytes=st.integers(1, 300))
@settings(deadline=None)
def test_buckets_keep_order_dtype_and_size(metas, bucket_bytes):
    split = list(buckets(metas, bucket_bytes))
    assert [meta for bucket in split for meta in bucket] == metas
    for bucket in split:
        assert len({meta.dtype for meta in bucket}) == 1
        assert len(bucket) == 1 or sum(meta.nbytes for meta in bucket) <= bucket_bytes


def test_a_bucket_is_filled_before_the_next_is_begun():
    a, b, c, d = (TensorMeta(name, "float32", (size,)) for name, size in zip("abcd", (2, 3, 20, 1), strict=True))
    assert list(buckets([a, b, c, d], 20)) == [[a, b], [c], [d]]  # 8 + 12 bytes fit 20; 80 go alone


@pytest.mark.parametrize(("dtype", "nbytes"), [("float32", 24), ("bfloat16", 12), ("int64", 48)])
def test_bytes_of_a_weight_follow_its_dtype(dtype, nbytes):
    assert TensorMeta("w", dtype, (2, 3)).nbytes == nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broadcast_delivers_to_every_member(dtype):
    port, weights = free_port(HOST), torch.arange(5, dtype=dtype)

    def member(rank):
        group = gloo_group(HOST, port, rank=rank, world=3, timeout_s=60.0)
        flat = weights.clone() if rank == 0 else torch.zeros_like(weights)
        broadcast(group, flat).wait()
        return flat

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(flat, weights) for flat in pool.map(member, range(3)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_member_that_never_comes_is_an_error_soon_after_the_timeout(rank):
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        gloo_group(HOST, free_port(HOST), rank=rank, world=2, timeout_s=0.5)
    assert time.monotonic() - started < SOON_S


def test_a_member_that_stops_taking_part_is_an_error_soon_after_the_timeout():
    port = free_port(HOST)
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda r: gloo_group(HOST, port, rank=r, world=2, timeout_s=1.0), range(2)))
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        broadcast(groups[1], torch.zeros(5)).wait()  # rank 0 sends nothing
    assert time.monotonic() - started < SOON_S


def test_a_free_port_can_be_listened_on_at_once():
    port = free_port(HOST)
    torch.distributed.TCPStore(HOST, port, 1, is_master=True)
