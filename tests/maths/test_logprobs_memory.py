"""What reading log-probs adds to memory."""

import torch

from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs
from tests.tensor_memory import TensorMemory


def test_reading_adds_at_most_an_eighth_of_the_logits_to_memory():
    # logits of 205 MB; `benchmarks/loss_memory.py` has the large case
    rows, width, vocabulary = 1024, 16, 50_000
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.zeros(rows, dtype=torch.int64)
    with TensorMemory() as held:
        read = read_logprobs(
            hidden,
            Head(weight),
            ids,
            ReadOptions(1.0, 128, entropy=True, tail=True),
            candidate_ids_NK=ids[:, None],
        )
        (
            read.sampled_N.sum()
            + read.entropy_N.sum()
            + read.candidates_NK.sum()
            + read.tail_N.sum()
        ).backward()
    assert weight.grad.any()
    assert held.most - weight.nbytes <= rows * vocabulary * 4 / 8  # beside the new gradient
