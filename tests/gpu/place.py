"""Where a check runs and how large it is: real shapes on a card, tiny ones in a rehearsal."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

GIB = 2**30
LIMIT_S = 120.0  # of one check on a card
# Qwen3-1.7B's and Qwen3-0.6B's config.json; weights are random
QWEN3_1_7B = dict(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
QWEN3_0_6B = QWEN3_1_7B | dict(hidden_size=1024, intermediate_size=3072)
TINY = QWEN3_1_7B | dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=5000,
    max_position_embeddings=1024,
)
# Dense bf16 FLOP/s of the datasheets, by what the driver calls the card; the first that fits.
PEAK = {
    "B300": 2.5e15,
    "GB300": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "4090": 165e12,
}

Record = Callable[..., None]  # (what, **figures): a row of the table, on disk at once


class Unfit(Exception):
    """The check needs more than this machine has: it is skipped, and says what is missing."""


class Cost(NamedTuple):
    """What a piece of work takes."""

    seconds: float  # median
    gib: float  # the most of the card's memory beyond what was held before; 0 on a CPU


def visible(first: int, count: int) -> str:
    """Name so many of this process's cards, from the `first` on, for CUDA_VISIBLE_DEVICES of
    another."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = named.split(",") if named else [f"{i}" for i in range(torch.cuda.device_count())]
    return ",".join(cards[first : first + count])


@dataclass(frozen=True)
class Place:
    """Where a check runs. `folder` is for its files."""

    device: str  # "cuda", or "cpu" for a rehearsal
    tiny: bool
    folder: Path
    model: str | None = None  # checkpoint for what random weights cannot show

    @property
    def large(self) -> dict[str, Any]:
        """Shape of what stands alone on a card."""
        return TINY if self.tiny else QWEN3_1_7B

    @property
    def small(self) -> dict[str, Any]:
        """Shape of what shares its card with an engine."""
        return TINY if self.tiny else QWEN3_0_6B

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return 256 if self.tiny else 16384

    def lengths(self, kind: str) -> list[int]:
        """Lengths of the segments of a micro-batch: one, eight alike, or one that is half of it
        and many short ones, which a heavy tail leaves."""
        if kind == "one":
            return [self.tokens]
        if kind == "even":
            return [self.tokens // 8] * 8
        return [self.tokens // 2] + [self.tokens // 64] * 32

    def card_gib(self) -> float:
        """Memory of the current card; 0 on a CPU."""
        if self.device == "cpu":
            return 0.0
        return torch.cuda.get_device_properties(0).total_memory / GIB

    def synchronize(self) -> None:
        """Wait for all that the card was given to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def empty(self) -> None:
        """Give back what torch's allocator keeps, and forget the peak so far."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """The most memory since `empty`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.device == "cuda" else 0.0

    def of_peak(self, flops: float) -> dict[str, float]:
        """FLOP/s as figures: TFLOP/s, and the share of the datasheet's where the card is known."""
        figures = {"tflops": flops / 1e12}
        if self.device == "cuda":
            name = torch.cuda.get_device_name(0)
            peak = next((peak for card, peak in PEAK.items() if card in name), None)
            if peak:
                figures["of_peak"] = flops / peak
        return figures

    def timed(self, work: Callable[[], object], repeat: int = 3) -> Cost:
        """Do `work` once to warm up, then measure it."""
        work()
        self.synchronize()
        self.empty()
        held = self.peak_gib()
        seconds = []
        for _ in range(1 if self.tiny else repeat):
            began = time.perf_counter()
            work()
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        return Cost(sorted(seconds)[len(seconds) // 2], self.peak_gib() - held)
