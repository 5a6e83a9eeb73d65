"""What DEAR's selection adds to memory at 16 k tokens."""

import pytest
import torch

from async_opd.maths.selection import decisions_and_evidence
from tests.tensor_memory import TensorMemory


def test_the_selection_adds_at_most_256_mib_at_16k_tokens():
    # all similarities at once would be 3,277 x 13,107 floats, 164 MiB, beside the rest
    tokens, width = 16_384, 1024
    hidden = torch.randn(tokens, width)
    entropy, gap = torch.rand(2, tokens)
    segment = torch.zeros(tokens, dtype=torch.int64)
    with TensorMemory() as held:
        chosen = decisions_and_evidence(entropy, gap, hidden, segment, 1, p=0.2, q=0.2)
    assert held.most <= 256 * 2**20
    assert chosen.float().mean().item() == pytest.approx(0.36, abs=1e-3)  # p + q (1 - p)
