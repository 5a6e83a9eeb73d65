"""Log-probs from hidden states through a language-model head, a block of logits at a time: [N, V] is never held.

`N` positions, `D` width, `V` vocabulary, `K` candidates; `R` positions and `B` ids of one block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_IDS = 4096  # of the vocabulary; with some hundred rows the block stays in a CPU's cache over all its passes


class Head(NamedTuple):
    """The map from hidden states to logits: z = h Wᵀ + b, then c · tanh(z / c) where logits are soft-capped."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    cap: float | None = None

    def logits(self, hidden_RD: Tensor, ids: slice = slice(None)) -> Tensor:
        """Logits [R, B] of some `ids`, float32 or wider."""
        bias_B = None if self.bias_V is None else self.bias_V[ids]
        z_RB = torch.nn.functional.linear(hidden_RD, self.weight_VD[ids], bias_B)
        z_RB = z_RB.to(torch.promote_types(z_RB.dtype, torch.float32))
        return z_RB if self.cap is None else z_RB.div_(self.cap).tanh_().mul_(self.cap)


class Read(NamedTuple):
    """What is read off the log-softmax of N positions; a field that was not asked for is None."""

    sampled_N: Tensor  # log-prob of `ids_N`
    entropy_N: Tensor | None  # full vocabulary, nats
    candidates_NK: Tensor | None  # log-probs of `candidate_ids_NK`
    topk_ids_NK: Tensor | None  # int64
    topk_NK: Tensor | None  # log-probs, largest first; without gradient
    hidden_ND: Tensor | None = None  # what it was read from, detached, where the caller adds it


def read_logprobs(
    hidden_ND: Tensor,
    head: Head,
    ids_N: Tensor,
    *,
    temperature: float,
    chunk_rows: int,
    entropy: bool = False,
    candidate_ids_NK: Tensor | None = None,
    topk: int = 0,
    topk_below: int | None = None,
) -> Read:
    """Read log-probs of softmax(head(h) / temperature) for N positions, `chunk_rows` at a time.

    logp = z - log Σ_v exp z_v,  z = head(h) / T;  H = -Σ_v exp(logp_v) · logp_v

    The backward pass computes each block of logits again, so at most two of [chunk_rows, BLOCK_IDS] live at once.
    `topk` picks among ids below `topk_below` (a padded vocabulary is never a candidate), normalised over all of V.

    >>> eye = torch.eye(2) * 0.6931472
    >>> read_logprobs(eye, Head(torch.eye(2)), torch.tensor([0, 0]), temperature=1.0, chunk_rows=1).sampled_N
    tensor([-0.4055, -1.0986])
    """
    asked = (temperature, chunk_rows, entropy, topk, topk_below)
    return Read(*_ReadLogprobs.apply(hidden_ND, *head, ids_N, candidate_ids_NK, *asked))


class _ReadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, bias_V, cap, ids_N, candidate_ids_NK, temperature, chunk_rows, entropy, topk, below
    ):
        head, vocabulary = Head(weight_VD, bias_V, cap), len(weight_VD)
        below = vocabulary if below is None else below
        given_NI = ids_N[:, None] if candidate_ids_NK is None else torch.cat([ids_N[:, None], candidate_ids_NK], 1)
        parts = []
        for rows in _slices(len(hidden_ND), chunk_rows):
            largest_R = total_R = moment_R = None  # of exp(z - largest), and of (z - largest) · exp(z - largest)
            given_RI, top_RK, top_ids_RK = 0.0, None, None
            for ids in _slices(vocabulary, BLOCK_IDS):
                z_RB = head.logits(hidden_ND[rows], ids).div_(temperature)
                at_RI, inside_RI = _inside(given_NI[rows], ids)
                given_RI = given_RI + z_RB.gather(1, at_RI) * inside_RI
                if topk and ids.start < below:
                    best = z_RB[:, : below - ids.start].topk(min(topk, z_RB.shape[1], below - ids.start))
                    top_RK, top_ids_RK = _merge(top_RK, top_ids_RK, best.values, best.indices + ids.start, topk)
                block_R = z_RB.amax(1)
                before_R, largest_R = largest_R, block_R if largest_R is None else torch.maximum(largest_R, block_R)
                z_RB.sub_(largest_R[:, None])
                p_RB = z_RB.exp() if entropy else z_RB.exp_()
                if before_R is not None:
                    shift_R = before_R - largest_R
                    if entropy:
                        moment_R = shift_R.exp() * (moment_R + shift_R * total_R)
                    total_R = total_R * shift_R.exp()
                total_R = p_RB.sum(1) if total_R is None else total_R + p_RB.sum(1)
                if entropy:
                    here_R = p_RB.mul_(z_RB).sum(1)
                    moment_R = here_R if moment_R is None else moment_R + here_R
            log_R = total_R.log()
            parts.append(
                (
                    largest_R,
                    log_R,
                    (given_RI - largest_R[:, None]).sub_(log_R[:, None]),  # in this order: exact for large logits too
                    log_R - moment_R / total_R if entropy else None,
                    top_ids_RK,
                    (top_RK - largest_R[:, None]).sub_(log_R[:, None]) if topk else None,
                )
            )
        largest_N, log_N, given_logp_NI, entropy_N, top_ids_NK, top_NK = (
            None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
        )
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, given_NI, largest_N, log_N, entropy_N)
        ctx.settings = cap, temperature, chunk_rows
        ctx.mark_non_differentiable(*(x for x in (top_ids_NK, top_NK) if x is not None))
        candidates_NK = None if candidate_ids_NK is None else given_logp_NI[:, 1:].contiguous()
        return given_logp_NI[:, 0].contiguous(), entropy_N, candidates_NK, top_ids_NK, top_NK

    @staticmethod
    @once_differentiable
    def backward(ctx, sampled_grad_N, entropy_grad_N, candidates_grad_NK, *_):
        hidden_ND, weight_VD, bias_V, given_NI, largest_N, log_N, entropy_N = ctx.saved_tensors
        cap, temperature, chunk_rows = ctx.settings
        head = Head(weight_VD, bias_V, cap)
        grad_NI = sampled_grad_N[:, None]
        if candidates_grad_NK is not None:
            grad_NI = torch.cat([grad_NI, candidates_grad_NK], 1)
        hidden_grad_ND, weight_grad_VD = torch.zeros_like(hidden_ND), torch.zeros_like(weight_VD)
        bias_grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in _slices(len(hidden_ND), chunk_rows):
            outer_R, total_R = grad_NI[rows].sum(1, keepdim=True), log_N[rows, None].exp()
            for ids in _slices(len(weight_VD), BLOCK_IDS):
                z_RB = head.logits(hidden_ND[rows], ids)
                slope_RB = None if cap is None else 1 - (z_RB / cap) ** 2
                z_RB.div_(temperature).sub_(largest_N[rows, None])
                if entropy_N is None:
                    grad_RB = z_RB.exp_().mul_(-outer_R / total_R)  # of given ids: onehots - p, the onehots below
                else:  # and of the entropy: -p (logp + H)
                    entropy_grad_R = entropy_grad_N[rows, None]
                    rest_R = (entropy_N - log_N)[rows, None] * entropy_grad_R + outer_R
                    scale_RB = (z_RB * entropy_grad_R).add_(rest_R)
                    grad_RB = z_RB.exp_().mul_(scale_RB).mul_(-1 / total_R)
                at_RI, inside_RI = _inside(given_NI[rows], ids)
                grad_RB.scatter_add_(1, at_RI, grad_NI[rows] * inside_RI)
                if slope_RB is not None:
                    grad_RB.mul_(slope_RB)
                grad_RB = grad_RB.div_(temperature).to(weight_VD.dtype)
                hidden_grad_ND[rows].addmm_(grad_RB, weight_VD[ids])
                weight_grad_VD[ids].addmm_(grad_RB.T, hidden_ND[rows])
                if bias_grad_V is not None:
                    bias_grad_V[ids] += grad_RB.sum(0)
        return hidden_grad_ND, weight_grad_VD, bias_grad_V, *[None] * 8


def _slices(length: int, size: int) -> Iterator[slice]:
    """Runs of `size` that cover `length`; an empty one covers nothing, so that results keep their shapes."""
    return (slice(at, min(at + size, length)) for at in range(0, max(length, 1), size))


def _inside(ids_RI: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where in `block` each id is, clamped, and whether it is there at all."""
    at_RI = ids_RI - block.start
    return at_RI.clamp(0, block.stop - block.start - 1), (ids_RI >= block.start) & (ids_RI < block.stop)


def _merge(values, ids, more_values, more_ids, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of two runs, each [R, ·]."""
    if values is None:
        return more_values, more_ids
    values, ids = torch.cat([values, more_values], 1), torch.cat([ids, more_ids], 1)
    best = values.topk(min(k, values.shape[1]))
    return best.values, ids.gather(1, best.indices)
