"""Weights of a generator that change in flight, without a learner."""

import asyncio
import copy
from typing import TYPE_CHECKING

import torch

from async_opd.core.weights import WeightLayout
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.sender import GlooSender

if TYPE_CHECKING:
    from async_opd.roles.rollout.generator import RolloutGenerator


class Moving:
    """Sends a generator models of which each is the one before, moved at random; `models` are those
    it has had, by version."""

    def __init__(self, generator: "RolloutGenerator", model: torch.nn.Module, *, timeout_s: float):
        self.models = [model]
        self._generator = generator
        self._sender = GlooSender("127.0.0.1", bucket_bytes=1 << 20, timeout_s=timeout_s)
        self._rng = torch.Generator().manual_seed(0)
        self._pieces = checkpoint_names.pieces(model)
        self._described = [meta for piece in self._pieces for meta in piece.tensors]

    async def join(self) -> None:
        """Form the group of the two."""
        await asyncio.gather(
            self._generator.join_group(self._sender.group(1, 2)),
            asyncio.to_thread(self._sender.join, 2),
        )

    async def update(self) -> None:
        """Send the next model, and have the generator run on."""
        moved = copy.deepcopy(self.models[-1])
        with torch.no_grad():
            for weight in moved.parameters():
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=self._rng))
        described = ((meta.name, meta.dtype, tuple(meta.shape)) for meta in self._described)
        layout = WeightLayout(*zip(*described, strict=True))
        weights = checkpoint_names.tensors(moved, self._pieces, dict(moved.named_parameters()))
        await asyncio.gather(
            self._generator.update(len(self.models), layout, 0),
            asyncio.to_thread(self._sender.send, self._described, weights),
        )
        self.models.append(moved)
        await self._generator.resume(0)
