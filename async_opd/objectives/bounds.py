"""Bounds on what one token may say: on its signal, and on what its signal is multiplied by."""

import math
from collections.abc import Callable
from dataclasses import replace

from async_opd.maths import Tensor
from async_opd.objectives.token_batch import TokenBatch, TokenLoss

LIVE = ("student_logp_N", "student_logp_NK", "student_tail_logp_N", "student_entropy_N")
ROUNDING = 1e-5  # of sums in float32


def scale(size: Tensor, at_most: float) -> Tensor:
    """Compute min(1, c / size), what brings a size ≥ 0 down to c. Any shape."""
    return at_most / size.clamp(min=at_most)


def largest(value_N: Tensor) -> Tensor:
    """Take the largest, 0-d; -inf of none."""
    return value_N.max() if len(value_N) else value_N.new_full((), -math.inf)


def signal(
    token_loss: Callable[[TokenBatch], TokenLoss], batch: TokenBatch, at_most: float
) -> TokenLoss:
    """Scale ℓ of each token, and its advantage, by min(1, c · F / Σ|∂ℓ/∂x|), F = W · ρ̃ plus the
    factor of a second part, the sum over what ℓ reads of the live student at that token; so the
    direction of its gradient stays. Does nothing where the method has clipped its own signal.

    Takes the loss twice: the slopes are those at leaves, as only the learner's own backward may
    pass through what its module gave.
    """
    import torch

    live = {name: x for name in LIVE if (x := getattr(batch, name)) is not None}
    leaves = {name: x.detach().requires_grad_() for name, x in live.items() if x.requires_grad}
    with torch.enable_grad():
        loss_N = token_loss(replace(batch, **leaves)).loss_N
    if leaves:  # none in a step over no token, which goes nowhere
        torch.autograd.backward(loss_N.sum(), inputs=list(leaves.values()))
    size_N = torch.zeros_like(loss_N.detach())
    for leaf in leaves.values():
        if leaf.grad is not None:
            size_N += leaf.grad.abs().reshape(len(size_N), -1).sum(1)
    method = token_loss(batch)
    factor_N = method.weight_N
    if method.ratio is not None:
        factor_N = factor_N * method.ratio.reshape(len(size_N), -1).mean(1)
    if method.added_N is not None:
        factor_N = factor_N + method.added_N
    allowed_N = at_most * factor_N
    over_N = size_N > allowed_N * (1 + ROUNDING)
    scale_N = (allowed_N / size_N).where(over_N, 1)
    advantage = method.advantage
    if advantage is not None:
        lowered_N = scale_N.to(advantage.dtype)
        advantage = advantage * (lowered_N[:, None] if advantage.ndim == 2 else lowered_N)
    bounded_N = over_N if method.bounded_N is None else over_N | method.bounded_N
    return replace(method, loss_N=method.loss_N * scale_N, advantage=advantage, bounded_N=bounded_N)
