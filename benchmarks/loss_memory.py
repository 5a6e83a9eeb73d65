"""Memory and time of reading log-probs through the LM head, against holding the logits.

8,192 tokens, width 512, vocabulary 150,000, fp32; the loss is the sum of the sampled tokens'
log-probs. Each side runs in processes of its own, in turn. Memory is the process's peak beyond
hidden states, weights and their gradients.

    python benchmarks/loss_memory.py --out loss_memory.json [--threads 2] [--repeat 3]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from async_opd.launch.new_run import environment
from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs

TOKENS, WIDTH, VOCABULARY = 8192, 512, 150_000
LOGITS = 4 * TOKENS * VOCABULARY  # bytes


def peak() -> int:
    """The most memory this process ever held, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    )


def once(side: str, threads: int) -> dict:
    """One forward and backward of one side."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    hidden.grad += 0  # touched, so that it is in memory
    weight.grad += 0
    ids = torch.randint(VOCABULARY, (TOKENS,))
    before, started = peak(), time.perf_counter()
    if side == "held":
        logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight), -1).gather(
            1, ids[:, None]
        )
    else:
        logp = read_logprobs(hidden, Head(weight), ids, ReadOptions(1.0, 1024)).sampled_N
    logp.sum().backward()
    found = {"seconds": time.perf_counter() - started, "bytes": peak() - before}
    return found | {"gradient": [x.grad.double().norm().item() for x in (hidden, weight)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="result JSON")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=1, help="repetitions of each side, in turn")
    parser.add_argument("--side", choices=("held", "blocks"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(once(args.side, args.threads)))
        return
    raw = {"held": [], "blocks": []}
    for _ in range(args.repeat):
        for side, runs in raw.items():
            command = [
                sys.executable,
                __file__,
                "--out",
                args.out,
                "--threads",
                str(args.threads),
                "--side",
                side,
            ]
            runs.append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    held, blocks = (
        {k: statistics.median(r[k] for r in runs) for k in ("seconds", "bytes")}
        for runs in raw.values()
    )
    result = {
        "share_of_logits": blocks["bytes"] / LOGITS,
        "time_ratio": blocks["seconds"] / held["seconds"],
        "gradient_gap": max(
            abs(a / b - 1)
            for a, b in zip(raw["blocks"][0]["gradient"], raw["held"][0]["gradient"], strict=True)
        ),
    }
    print(f"{'logits':>8} {'seconds':>8} {'added GB':>9}   limited by")
    print(
        f"{'held':>8} {held['seconds']:>8.1f} {held['bytes'] / 1e9:>9.2f}   memory traffic over 4.9"
        " GB tensors"
    )
    print(
        f"{'blocks':>8} {blocks['seconds']:>8.1f} {blocks['bytes'] / 1e9:>9.2f}   the matrix"
        " product, once more"
    )
    print(", ".join(f"{key} {value:.3g}" for key, value in result.items()))
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": args.threads}
    args.out.write_text(
        json.dumps(result | {"seed": 0, "hardware": hardware, "raw": raw} | environment(), indent=2)
    )


if __name__ == "__main__":
    main()
