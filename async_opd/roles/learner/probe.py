"""What a parity probe has sampled, packed as training packs it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from async_opd.core.wire import Ints
from async_opd.roles.learner.batch import MicroBatch
from async_opd.roles.models.causal_lm import segments

Pair = tuple[Ints, Ints]  # ids of a prompt [P] and of its response [T]


def probe_batches(ids: Sequence[Ints], empty: MicroBatch, most_tokens: int) -> Iterator[MicroBatch]:
    """Pack prompts and responses, which come in turn, in their order: micro-batches like `empty`
    with tokens to be read, at most so many each unless one alone has more."""
    for pairs in _parts([*zip(ids[::2], ids[1::2], strict=True)], most_tokens):
        parts, rows = segments(pairs)
        device = empty.ids_L.device
        yield replace(
            empty,
            ids_L=torch.as_tensor(np.concatenate(parts), dtype=torch.int64, device=device),
            segment_lengths=[len(part) for part in parts],
            rows_N=torch.as_tensor(np.concatenate(rows), dtype=torch.int64, device=device),
            targets_N=torch.as_tensor(
                np.concatenate([response for _, response in pairs]),
                dtype=torch.int64,
                device=device,
            ),
        )


def _parts(pairs: list[Pair], most_tokens: int) -> Iterator[list[Pair]]:
    part: list[Pair] = []
    tokens = 0
    for pair in pairs:
        size = len(pair[0]) + len(pair[1])
        if part and tokens + size > most_tokens:
            yield part
            part, tokens = [], 0
        part.append(pair)
        tokens += size
    if part:
        yield part
