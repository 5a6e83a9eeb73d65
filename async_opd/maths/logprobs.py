"""Log-probs from hidden states through a language-model head, in row chunks, so that [N, V] is never held."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Read(NamedTuple):
    """What is read off the log-softmax of N positions; a field that was not asked for is None."""

    sampled_N: Tensor  # log-prob of `ids_N`
    entropy_N: Tensor | None  # full vocabulary, nats
    candidates_NK: Tensor | None  # log-probs of `candidate_ids_NK`
    topk_ids_NK: Tensor | None  # int64
    topk_NK: Tensor | None  # log-probs, largest first


def read_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
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

    logp = log_softmax(head(h) / T);  H = -Σ_v exp(logp_v) · logp_v

    Under autograd each chunk is recomputed in the backward pass, so at most [chunk_rows, V] logits live at once.
    `topk` picks among ids below `topk_below` (a padded vocabulary is never a candidate), normalised over all of V.

    >>> eye = torch.eye(2) * 0.6931472
    >>> read_logprobs(eye, lambda h: h, torch.tensor([0, 0]), temperature=1.0, chunk_rows=1).sampled_N
    tensor([-0.4055, -1.0986])
    """

    def rows(hidden_CD: Tensor, ids_C: Tensor, candidate_ids_CK: Tensor | None) -> tuple[Tensor | None, ...]:
        logp_CV = torch.log_softmax(head(hidden_CD).float() / temperature, dim=-1)
        sampled_C = logp_CV.gather(-1, ids_C[:, None]).squeeze(-1)
        entropy_C = -(logp_CV.exp() * logp_CV).sum(-1) if entropy else None
        candidates_CK = None if candidate_ids_CK is None else logp_CV.gather(-1, candidate_ids_CK)
        top = logp_CV[:, :topk_below].topk(topk, dim=-1) if topk else None
        return sampled_C, entropy_C, candidates_CK, top and top.indices, top and top.values

    chunks = []
    for at in range(0, max(len(hidden_ND), 1), chunk_rows):
        here = slice(at, at + chunk_rows)
        candidates = None if candidate_ids_NK is None else candidate_ids_NK[here]
        args = (hidden_ND[here], ids_N[here], candidates)
        recompute = torch.is_grad_enabled() and hidden_ND.requires_grad
        chunks.append(checkpoint(rows, *args, use_reentrant=False) if recompute else rows(*args))
    return Read(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))
