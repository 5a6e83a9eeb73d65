"""Log-probs from hidden states through a language-model head, a block of logits at a time: [N, V]
is never held.

`N` positions, `D` width, `V` vocabulary, `K` candidates; `R` positions and `B` ids of one block;
`I` the sampled id and, behind it, the candidates of a position.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from async_opd.maths.blocks import head_block, slices
from async_opd.maths.head import LEFT_OUT, Head, Without, add_product, is_nothing

# nats, the log-mass of no ids at all: its exp vanishes, and products with it are finite
NOTHING = -100.0


class Read(NamedTuple):
    """What is read off the log-softmax of N positions; a field that was not asked for is None."""

    sampled_N: Tensor  # log-prob of `ids_N`
    entropy_N: Tensor | None  # full vocabulary, nats
    candidates_NK: Tensor | None  # log-probs of `candidate_ids_NK`
    topk_ids_NK: Tensor | None  # int64
    topk_NK: Tensor | None  # log-probs, largest first; without gradient
    tail_N: Tensor | None = None  # log-mass of all ids but the candidates, given ones or the topk
    hidden_ND: Tensor | None = None  # what it was read from, detached, where the caller adds it


class ReadOptions(NamedTuple):
    """What is read besides the log-probs of given ids, and how.

    `topk` picks among all ids but `topk_without`, normalised over the same ids as ever.
    """

    temperature: float  # that logits are divided by
    # positions that are read at a time; None: by their device, `blocks.head_block`
    chunk_rows: int | None = None
    entropy: bool = False
    topk: int = 0  # K: the likeliest ids with their log-probs
    topk_without: Without | None = None
    tail: bool = False  # log-mass of all ids but the candidates, or where none are given the topk


class _Rows(NamedTuple):
    """What is read of R rows, and what the backward pass needs of them."""

    largest_R: Tensor  # z
    log_R: Tensor  # of Σ exp(z - largest)
    given_logp_RI: Tensor
    entropy_R: Tensor | None
    topk_ids_RK: Tensor | None
    topk_RK: Tensor | None
    tail_z_R: Tensor | None  # log Σ exp z over what is no candidate, -inf of nothing


def read_logprobs(
    hidden_ND: Tensor,
    head: Head,
    ids_N: Tensor,
    options: ReadOptions,
    *,
    candidate_ids_NK: Tensor | None = None,
) -> Read:
    """Read log-probs of softmax(head(h) / temperature) for N positions, a block of [chunk_rows,
    ids] at a time, `blocks.head_block`.

    logp = z - log Σ_v exp z_v,  z = head(h) / T;  H = -Σ_v exp(logp_v) · logp_v
    tail = log Σ_v exp(logp_v) over the v that are no candidates

    The backward pass computes each block of logits again, so one float32 block lives at a time, or
    two where entropy or tail are asked for, or three where it takes the gradient of both, and
    beside them in half precision the float32 sums of gradients, [N, D] and [ids, D]: what many
    blocks add up to is rounded once. `tail` is what `candidate_ids_NK` leave, or where none are
    given what the topk leave, without gradient. It is summed over the ids themselves: 1 - Σ_k p_k
    is lost to rounding where it is small. It is NOTHING where the candidates are all of V. The
    log-prob of an id beyond the head's, or one that is left out of it, is NaN.

    >>> eye, sampled = torch.eye(2) * 0.6931472, torch.tensor([0, 0])
    >>> read_logprobs(eye, Head(torch.eye(2)), sampled, ReadOptions(1.0, chunk_rows=1)).sampled_N
    tensor([-0.4055, -1.0986])
    """
    weight_VD, bias_V, *rest = head
    return Read(
        *_ReadLogprobs.apply(hidden_ND, weight_VD, bias_V, rest, ids_N, candidate_ids_NK, options)
    )


class _ReadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch's own type has neither saved_tensors nor what is kept on it
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rest: list[Any],  # of the head: what is no tensor and gets no gradient
        ids_N: Tensor,
        candidate_ids_NK: Tensor | None,
        options: ReadOptions,
    ) -> tuple[Tensor | None, ...]:
        head = Head(weight_VD, bias_V, *rest)
        block = head_block(hidden_ND.device.type, options.chunk_rows)
        given_NI = _beside(ids_N, candidate_ids_NK)
        chunks = [
            _read_rows(head, hidden_ND[rows], given_NI[rows], options, block.ids)
            for rows in slices(len(hidden_ND), block.rows)
        ]
        columns = zip(*chunks, strict=True)
        read = _Rows._make(None if part[0] is None else torch.cat(part) for part in columns)
        ctx.save_for_backward(
            hidden_ND,
            weight_VD,
            bias_V,
            given_NI,
            read.largest_R,
            read.log_R,
            read.entropy_R,
            read.tail_z_R,
        )
        ctx.rest = rest
        ctx.options, ctx.block = options, block
        tail_N = None
        if read.tail_z_R is not None:
            tail_N = (read.tail_z_R - read.largest_R).sub_(read.log_R)
            tail_N.masked_fill_(is_nothing(read.tail_z_R), NOTHING)
        constant = [read.topk_ids_RK, read.topk_RK, tail_N if candidate_ids_NK is None else None]
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        candidates_NK = None if candidate_ids_NK is None else read.given_logp_RI[:, 1:].contiguous()
        sampled_N = read.given_logp_RI[:, 0].contiguous()
        return sampled_N, read.entropy_R, candidates_NK, read.topk_ids_RK, read.topk_RK, tail_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a gradient an output
        ctx: Any,
        sampled_grad_N: Tensor,
        entropy_grad_N: Tensor,
        candidates_grad_NK: Tensor | None,
        _ids: None,
        _topk: None,
        tail_grad_N: Tensor,
    ) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, given_NI, *saved = ctx.saved_tensors
        largest_N, log_N, entropy_N, tail_z_N = saved
        head = Head(weight_VD, bias_V, *ctx.rest)
        grad_NI = _beside(sampled_grad_N, candidates_grad_NK)
        outer_N1, total_N1 = grad_NI.sum(1, keepdim=True), log_N[:, None].exp()
        if tail := ctx.options.tail and candidates_grad_NK is not None:
            nothing_N = is_nothing(tail_z_N)
            tail_z_N = tail_z_N.masked_fill(nothing_N, 0)
            tail_grad_N = tail_grad_N.masked_fill(nothing_N, 0)
            outer_N1 = outer_N1 + tail_grad_N[:, None]
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=wide)
        trained = ctx.needs_input_grad[1]
        weight_grad_VD = torch.zeros_like(weight_VD) if trained else weight_VD[:0]
        bias_grad_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        tail_RB = None
        for ids in slices(head.end, ctx.block.ids):
            weight_grad_BD = weight_grad_VD[ids].to(wide)  # the same memory where it is as wide
            for rows in slices(len(hidden_ND), ctx.block.rows):
                z_RB = head.logits(hidden_ND[rows], ids)
                slope_RB = None if head.cap is None else 1 - (z_RB / head.cap) ** 2
                z_RB.div_(ctx.options.temperature)
                head.leave_out(z_RB, ids)
                at_RI, inside_RI = _inside(given_NI[rows], ids)
                if tail:  # of the tail: its own softmax, and - p below
                    tail_RB = _without(z_RB, at_RI[:, 1:], inside_RI[:, 1:])
                    tail_RB.sub_(tail_z_N[rows, None]).exp_().mul_(tail_grad_N[rows, None])
                z_RB.sub_(largest_N[rows, None])
                if entropy_N is None:  # of given ids: onehots - p, the onehots below
                    grad_RB = z_RB.exp_().mul_(-outer_N1[rows] / total_N1[rows])
                else:  # and of the entropy: -p (logp + H)
                    entropy_grad_R = entropy_grad_N[rows, None]
                    rest_R = (entropy_N - log_N)[rows, None] * entropy_grad_R + outer_N1[rows]
                    grad_RB = _times_exp(z_RB, entropy_grad_R, rest_R).mul_(-1 / total_N1[rows])
                if tail_RB is not None:
                    grad_RB.add_(tail_RB)
                    tail_RB = None
                grad_RB.scatter_add_(1, at_RI, grad_NI[rows] * inside_RI)
                if slope_RB is not None:
                    grad_RB.mul_(slope_RB)
                grad_RB = grad_RB.div_(ctx.options.temperature).to(weight_VD.dtype)
                add_product(hidden_grad_ND[rows], grad_RB, weight_VD[ids])
                if trained:
                    add_product(weight_grad_BD, grad_RB.T, hidden_ND[rows])
                if bias_grad_V is not None:
                    bias_grad_V[ids] += grad_RB.sum(0)
                del z_RB, grad_RB  # before the next ones are there
            if trained and wide != weight_VD.dtype:
                weight_grad_VD[ids] = weight_grad_BD
        bias_grad_V = None if bias_grad_V is None else bias_grad_V.to(weight_VD.dtype)
        return hidden_grad_ND.to(hidden_ND.dtype), weight_grad_VD, bias_grad_V, *[None] * 4


def _times_exp(z_RB: Tensor, slope_R1: Tensor, rest_R1: Tensor) -> Tensor:
    """Overwrite z by exp(z) · (slope · z + rest)."""
    factor_RB = (z_RB * slope_R1).add_(rest_R1)
    return z_RB.exp_().mul_(factor_RB)


def _read_rows(
    head: Head, hidden_RD: Tensor, given_RI: Tensor, options: ReadOptions, block_ids: int
) -> _Rows:
    """One pass over the vocabulary, block by block."""
    wide, chosen = torch.float32, options.topk_without  # or wider, as the logits are
    largest_R = hidden_RD.new_full(given_RI.shape[:1], torch.finfo(wide).min, dtype=wide)
    total_R = torch.zeros_like(largest_R)  # of exp(z - largest)
    moment_R = torch.zeros_like(largest_R)  # of (z - largest) · exp(z - largest)
    given_z_RI = hidden_RD.new_full(given_RI.shape, torch.nan, dtype=wide)
    tails: list[Tensor] = []  # log Σ exp z of parts of it
    top_RK = hidden_RD.new_empty(len(hidden_RD), 0)
    top_ids_RK = given_RI.new_empty(len(hidden_RD), 0)
    for ids in slices(head.end, block_ids):
        z_RB = head.logits(hidden_RD, ids).div_(options.temperature)
        head.leave_out(z_RB, ids)
        at_RI, inside_RI = _inside(given_RI, ids)
        given_z_RI = torch.where(inside_RI, z_RB.gather(1, at_RI), given_z_RI)
        taken_RK = at_RI[:, 1:], inside_RI[:, 1:]
        if options.topk and (chosen is None or ids.start < chosen.end):
            best = _largest(_but(z_RB, chosen, ids), options.topk)
            both_RK = torch.cat([top_RK, best.values], 1)
            kept = _largest(both_RK, options.topk)
            top_RK = kept.values
            both_ids_RK = torch.cat([top_ids_RK, best.indices + ids.start], 1)
            top_ids_RK = both_ids_RK.gather(1, kept.indices)
            if options.tail and given_RI.shape[1] == 1:  # no candidates but these
                taken_RK = best.indices, ~is_nothing(best.values)
                tails.append(_log_mass(_without(both_RK, kept.indices)))
        if options.tail:
            tails.append(_log_mass(_without(z_RB, *taken_RK)))
        before_R = largest_R
        largest_R = torch.maximum(before_R, z_RB.amax(1))
        shift_R = before_R - largest_R
        z_RB.sub_(largest_R[:, None])
        p_RB = z_RB.exp() if options.entropy else z_RB.exp_()
        more_R = p_RB.sum(1)
        if options.entropy:
            moved_R = shift_R.exp() * (moment_R + shift_R * total_R)
            moment_R = moved_R + p_RB.mul_(z_RB).sum(1)
        total_R = total_R * shift_R.exp() + more_R
        del z_RB, p_RB  # before the next ones are there
    log_R = total_R.log()
    given_z_RI.masked_fill_(is_nothing(given_z_RI), torch.nan)
    return _Rows(
        largest_R=largest_R,
        log_R=log_R,
        # in this order, which is exact for large z too
        given_logp_RI=(given_z_RI - largest_R[:, None]).sub_(log_R[:, None]),
        entropy_R=log_R - moment_R / total_R if options.entropy else None,
        topk_ids_RK=top_ids_RK if options.topk else None,
        topk_RK=(top_RK - largest_R[:, None]).sub_(log_R[:, None]) if options.topk else None,
        tail_z_R=torch.stack(tails, 1).logsumexp(1) if options.tail else None,
    )


def _beside(sampled_N: Tensor, candidates_NK: Tensor | None) -> Tensor:
    """What belongs to the sampled id and, behind it, to the candidates of a position, [N, I]."""
    first_N1 = sampled_N[:, None]
    return first_N1 if candidates_NK is None else torch.cat([first_N1, candidates_NK], 1)


def _inside(ids_RI: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Where in `block` each id is, clamped, and whether it is there at all."""
    inside_RI = (ids_RI >= block.start) & (ids_RI < block.stop)
    return (ids_RI - block.start).clamp(0, block.stop - block.start - 1), inside_RI


def _but(z_RB: Tensor, without: Without | None, ids: slice) -> Tensor:
    """Copy z of the block `ids` where there is something to leave out of it."""
    if without is None or not without.touches(ids):
        return z_RB
    return z_RB.masked_fill(without.marks_V[ids], LEFT_OUT)


def _largest(values: Tensor, k: int) -> torch.return_types.topk:
    """The `k` largest of each row, or all of a shorter one."""
    return values.topk(min(k, values.shape[1]))


def _without(z_RB: Tensor, at_RK: Tensor, inside_RK: Tensor | None = None) -> Tensor:
    """A copy of `z_RB` with -inf at these places, or at those that are inside."""
    less_RK = z_RB.new_full(at_RK.shape, -torch.inf)
    if inside_RK is not None:
        less_RK.masked_fill_(~inside_RK, 0)
    return z_RB.scatter_add(1, at_RK, less_RK)


def _log_mass(z_RB: Tensor) -> Tensor:
    """log Σ exp z of each row, -inf where all are; overwrites `z_RB`."""
    largest_R = z_RB.amax(1, keepdim=True).clamp_(min=torch.finfo(z_RB.dtype).min)
    return z_RB.sub_(largest_R).exp_().sum(1).log_().add_(largest_R[:, 0])
