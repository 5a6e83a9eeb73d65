"""Log-probs through the LM head at the vocabulary of Qwen3."""

from unittest import mock

import torch
from torch import Tensor

from async_opd.maths import blocks
from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs
from tests.gpu.place import Place, Record

LOOKED = 64  # rows that are compared with float64
ALLOWED = 0.1  # nats; logits of bfloat16 with a deviation of one are off by up to 2**-7 times 5
CANDIDATES = 32
OPTIONS = ReadOptions(1.0)  # the block by the device


def settings(place: Place, record: Record) -> None:
    """Log-probs agree with float64 at any number of rows; time, share of the card, memory."""
    torch.manual_seed(0)
    vocabulary, width = place.large["vocab_size"], place.large["hidden_size"]
    tokens, device = place.tokens, place.device
    bf16 = torch.bfloat16
    weight = (
        torch.randn(vocabulary, width, device=device, dtype=bf16) / width**0.5
    ).requires_grad_()
    hidden = torch.randn(tokens, width, device=device, dtype=bf16).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), device=device)
    candidates = torch.randint(vocabulary, (tokens, CANDIDATES), device=device)
    exact = exactly(hidden, weight, ids, torch.float64)
    rounded = exactly(hidden, weight, ids, bf16)
    record("logits in bfloat16 against float64", error=(rounded - exact).abs().max().item())
    flops = 8 * tokens * width * vocabulary  # forward, logits once more, two gradients
    for block, k, float32 in (
        *(((rows, 8192), k, False) for k in (0, CANDIDATES) for rows in (1024, 4096, 16384)),
        ((16384, 4096), 0, False),
        ((4096, 32768), 0, False),
        ((1024, vocabulary), 0, False),
        (blocks.ON_GPU, 0, True),
    ):
        chosen = blocks.HeadBlock(*block)
        head = Head(weight, float32=float32)

        def step(head: Head = head, k: int = k) -> None:
            read = read_logprobs(
                hidden, head, ids, OPTIONS, candidate_ids_NK=candidates if k else None
            )
            loss = read.sampled_N.sum()
            if read.candidates_NK is not None:
                loss = loss + read.candidates_NK.sum()
            loss.backward()

        with mock.patch.multiple(blocks, ON_GPU=chosen, ON_CPU=chosen):
            cost = place.timed(step)
            read = read_logprobs(hidden[:LOOKED], head, ids[:LOOKED], OPTIONS).sampled_N
        gap = (read.double() - exact).abs().max().item()
        record(
            f"{chosen.rows} rows of {chosen.ids} ids, {k} candidates"
            + ", logits in float32" * float32,
            ms=1e3 * cost.seconds,
            gib=cost.gib,
            error=gap,
            **place.of_peak(flops / cost.seconds),
        )
        assert gap <= ALLOWED, f"{chosen}: off by {gap} nats"


@torch.no_grad()
def exactly(hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Read log-probs of the first rows from whole logits of `dtype`, in float64."""
    logits = (hidden[:LOOKED].to(dtype) @ weight.to(dtype).T).double()
    return torch.log_softmax(logits, -1).gather(1, ids[:LOOKED, None])[:, 0]
