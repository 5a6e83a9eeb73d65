"""Rows of metrics.jsonl, and recorded samples: whatever stands there twice was written by two runs
that worked in one directory."""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from async_opd.core.run_dir import EARLIER_SAMPLES, SAMPLES, read_lines


class Row(Struct):
    """Of a row of metrics.jsonl."""

    step: Annotated[int, Meta(ge=1, lt=2**32)]


class Sample(Row):
    """Of a recorded trajectory."""

    id: str


R = TypeVar("R", bound=Row)


def steps_of(path: Path, discrepancies: list[str]) -> npt.NDArray[np.uint32] | None:
    """Read which steps have a row, in the order of the rows; None without a file. What is no row is
    a discrepancy, save at a torn end."""
    if not path.exists():
        return None
    return np.fromiter((row.step for row in read_rows(path, Row, discrepancies)), np.uint32)


def doubled(run_dir: Path, steps: npt.NDArray[np.uint32] | None) -> Iterator[str]:
    """Say which rows and samples are doubled, or in another order than one run writes them."""
    if steps is not None:
        known, counts = np.unique(steps, return_counts=True)
        twice = known[counts > 1]
        back = np.flatnonzero(steps[1:] < steps[:-1])
        if twice.size:
            yield f"metrics.jsonl has several rows of {_some(twice)}: two runs wrote into it"
        elif back.size:
            late, early = steps[back[0]], steps[back[0] + 1]
            yield f"metrics.jsonl: the row of step {early} stands behind that of step {late}"
    files = [run_dir / name for name in (EARLIER_SAMPLES, SAMPLES)]
    yield from _doubled_samples([file for file in files if file.exists()])


def _doubled_samples(files: list[Path]) -> Iterator[str]:
    """Say which samples are doubled. Memory is 8 bytes a sample."""
    unread: list[str] = []
    keys = np.sort(array("q", (_key(sample) for sample in _samples(files, unread))))
    yield from unread
    twice = set(keys[1:][keys[1:] == keys[:-1]].tolist())
    if twice:
        steps = {sample.step for sample in _samples(files, []) if _key(sample) in twice}
        yield f"samples.jsonl has a sample twice of {_some(np.array(sorted(steps)))}"


def _samples(files: list[Path], discrepancies: list[str]) -> Iterator[Sample]:
    for file in files:
        yield from read_rows(file, Sample, discrepancies)


def _key(sample: Sample) -> int:
    return hash((sample.step, sample.id))


def read_rows(path: Path, kind: type[R], discrepancies: list[str]) -> Iterator[R]:
    """Read the file at `path` line by line; a line that is no `kind` is a discrepancy."""
    rows = read_lines(
        path,
        msgspec.json.Decoder(kind).decode,
        lambda number, error: discrepancies.append(f"{path}, line {number}: not a row: {error}"),
    )
    return (row for _, row in rows)


def _some(steps: npt.NDArray[np.integer]) -> str:
    """Name steps, which are in order, by the first and the last of them."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
