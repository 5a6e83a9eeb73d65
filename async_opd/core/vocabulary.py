"""Which ids the models of a run have, end by, and mean by one another's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# Runs [first, behind the last) of ids, in order: few numbers, whatever the vocabulary.
Ids = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the ids of a run stand for, by the sections of its models. Made by `launch.vocabulary`;
    consumed by the runtime."""

    student: Ids  # that may be sampled; its log-probs are over these
    eos_ids: tuple[int, ...]  # that end a response
    stops: tuple[int | str, ...] = ()  # ids of rollout.stop, and its texts
    # of each scorer, what its log-probs are over; absent: all of its head
    whole: Mapping[str, Ids] = field(default_factory=dict[str, Ids])
    # of each teacher, its ends and the student's that they are read as
    ends_as: Mapping[str, tuple[tuple[int, int], ...]] = field(
        default_factory=dict[str, tuple[tuple[int, int], ...]]
    )
    # end ids and tokens of each model, and the file that names them, for people
    ends: Mapping[str, Mapping[str, object]] = field(
        default_factory=dict[str, Mapping[str, object]]
    )


def runs(ids: Iterable[int]) -> Ids:
    """Put ids together to runs.

    >>> runs([3, 0, 1, 2, 7])
    ((0, 4), (7, 8))
    """
    ordered = np.unique(np.fromiter(ids, np.int64))
    parts = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts if len(part))


def listed(ids: Ids) -> npt.NDArray[np.int64]:
    """List every one of `ids`, ascending."""
    return np.concatenate([np.arange(0), *(np.arange(*run) for run in ids)])


def others(ids: Ids, size: int) -> npt.NDArray[np.bool_]:
    """Mark what is none of `ids`, of a head of `size`."""
    marks = np.ones(size, np.bool_)
    for start, stop in ids:
        marks[start:stop] = False
    return marks


def exchanged(
    ids: npt.NDArray[np.int32], pairs: Iterable[tuple[int, int]]
) -> npt.NDArray[np.int32]:
    """Write each of a pair of ids for the other; the array itself where there is no pair.

    >>> exchanged(np.array([5, 1, 2]), [(2, 5)])
    array([2, 1, 5])
    """
    result = ids
    for one, other in pairs:
        result = np.where(ids == one, other, np.where(ids == other, one, result))
    return result.astype(ids.dtype, copy=False)


def drawn(ids: Ids, count: int) -> npt.NDArray[np.int32]:
    """Draw `count` of `ids`, the same every time."""
    every = listed(ids).astype(np.int32)
    return every[np.random.default_rng(0).integers(len(every), size=count, dtype=np.int32)]
