"""Blocks in which much is read, so that it never lies in memory at once."""

from collections.abc import Iterator

# Of the vocabulary; with some hundred rows the block stays in a CPU's cache over all its passes.
BLOCK_IDS = 4096


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut `length` into runs of `size`; an empty one covers nothing, so that results keep their
    shapes.

    >>> [(block.start, block.stop) for block in slices(5, 2)], [*slices(0, 2)]
    ([(0, 2), (2, 4), (4, 5)], [slice(0, 0, None)])
    """
    return (slice(start, min(start + size, length)) for start in range(0, max(length, 1), size))
