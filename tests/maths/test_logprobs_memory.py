"""What reading log-probs adds to memory, in a process of its own."""

import subprocess
import sys

PEAK = """
import sys, torch
from async_opd.maths.logprobs import Head, read_logprobs

def peak():  # bytes, the most this process ever held
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

rows, width, vocabulary = map(int, sys.argv[1:])
hidden = torch.randn(rows, width, requires_grad=True)
weight = torch.randn(vocabulary, width, requires_grad=True)
hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
warm = torch.ones(2, width, requires_grad=True)
read_logprobs(warm, Head(weight[:9]), torch.zeros(2).long(), temperature=1.0, chunk_rows=1).sampled_N.sum().backward()
before = peak()
ids = torch.zeros(rows, dtype=torch.int64)
read = read_logprobs(hidden, Head(weight), ids, temperature=1.0, chunk_rows=512, entropy=True)
(read.sampled_N.sum() + read.entropy_N.sum()).backward()
print(peak() - before - weight.nbytes)  # the new gradient, before it is added to the old one
"""


def test_reading_adds_at_most_an_eighth_of_the_logits_to_memory():
    rows, width, vocabulary = 4096, 16, 50_000  # logits of 819 MB; `benchmarks/loss_memory.py` has the large case
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(rows), str(width), str(vocabulary)], capture_output=True, check=True
    )
    assert int(out.stdout) <= rows * vocabulary * 4 / 8
