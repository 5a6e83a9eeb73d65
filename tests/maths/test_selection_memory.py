"""What DEAR's selection adds to memory at 16 k tokens, in a process of its own."""

import os
import subprocess
import sys

PEAK = """
import sys, torch
from async_opd.maths.selection import decisions_and_evidence

def peak():  # bytes, the most this process ever held
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

def select(tokens, width):
    hidden = torch.randn(tokens, width)
    entropy, gap = torch.rand(2, tokens)
    segment = torch.zeros(tokens, dtype=torch.int64)
    before = peak()
    chosen = decisions_and_evidence(entropy, gap, hidden, segment, 1, p=0.2, q=0.2)
    return peak() - before, chosen.float().mean().item()

select(64, 64)  # loads the kernels
print(*select(*map(int, sys.argv[1:])))
"""


def test_the_selection_adds_at_most_256_mib_at_16k_tokens():
    tokens, width = 16_384, 1024  # all similarities at once would be 3,277 x 13,107 floats, 164 MiB, beside the rest
    command = [sys.executable, "-c", PEAK, str(tokens), str(width)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, so only what lives counts
    added, share = subprocess.run(command, capture_output=True, check=True, env=exact).stdout.split()
    assert int(added) <= 256 * 2**20
    assert abs(float(share) - 0.36) < 1e-3  # p + q (1 - p)
