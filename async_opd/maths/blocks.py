"""Blocks in which much is read, so that it never lies in memory at once."""

from collections.abc import Iterator
from typing import NamedTuple


class HeadBlock(NamedTuple):
    """Of [·, vocabulary] what is read at a time."""

    rows: int  # positions
    ids: int  # of the vocabulary


# With some hundred rows a block stays in a CPU's cache over all its passes. A GPU has no such
# cache, and pays for each kernel that is launched: there a block is 512 MiB of float32, so that
# 16,384 positions of a vocabulary of 151,936 take hundreds of launches, not tens of thousands.
ON_CPU = HeadBlock(rows=1024, ids=4096)
ON_GPU = HeadBlock(rows=16384, ids=8192)


def head_block(device: str, rows: int | None = None) -> HeadBlock:
    """Choose the block for tensors on a `device` of torch's kinds, of so many `rows` where that is
    set. The "meta" device stands for a GPU.

    >>> head_block("cpu"), head_block("cuda", 512)
    (HeadBlock(rows=1024, ids=4096), HeadBlock(rows=512, ids=8192))
    """
    block = ON_CPU if device == "cpu" else ON_GPU
    return block if rows is None else block._replace(rows=rows)


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut `length` into runs of `size`; an empty one covers nothing, so that results keep their
    shapes.

    >>> [(block.start, block.stop) for block in slices(5, 2)], [*slices(0, 2)]
    ([(0, 2), (2, 4), (4, 5)], [slice(0, 0, None)])
    """
    return (slice(start, min(start + size, length)) for start in range(0, max(length, 1), size))
