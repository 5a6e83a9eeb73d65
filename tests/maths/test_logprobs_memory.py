"""What reading log-probs adds to memory, in a process of its own."""

import os
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
warm, head = torch.ones(512, width, requires_grad=True), Head(weight[:5000])  # loads the kernels
asked = dict(temperature=1.0, chunk_rows=512, entropy=True, tail=True)

def read(hidden, head):
    ids = torch.zeros(len(hidden), dtype=torch.int64)
    found = read_logprobs(hidden, head, ids, candidate_ids_NK=ids[:, None], **asked)
    (found.sampled_N.sum() + found.entropy_N.sum() + found.candidates_NK.sum() + found.tail_N.sum()).backward()

read(warm, head)
before = peak()
read(hidden, Head(weight))
print(peak() - before - weight.nbytes)  # the new gradient, before it is added to the old one
"""


def test_reading_adds_at_most_an_eighth_of_the_logits_to_memory():
    rows, width, vocabulary = 4096, 16, 50_000  # logits of 819 MB; `benchmarks/loss_memory.py` has the large case
    command = [sys.executable, "-c", PEAK, str(rows), str(width), str(vocabulary)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, so only what lives counts
    out = subprocess.run(command, capture_output=True, check=True, env=exact)
    assert int(out.stdout) <= rows * vocabulary * 4 / 8
