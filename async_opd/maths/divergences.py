"""Divergences between student and teacher over K candidates a position plus one bucket for the rest."""

import torch
from torch import Tensor

TAIL_FLOOR = 1e-6  # probability below which the rest counts as this much on both sides, so K = V is exact


def with_tail(logp_NK: Tensor) -> Tensor:
    """Append the log-mass of everything outside the K candidates: log max(1 - Σ_k p_k, 1e-6). Returns [N, K+1].

    >>> with_tail(torch.tensor([[0.5, 0.25]]).log()).exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    """
    tail_N = (1 - logp_NK.exp().sum(-1)).clamp(min=TAIL_FLOOR)
    return torch.cat([logp_NK, tail_N.log()[:, None]], dim=-1)


def outcomes(logp_NK: Tensor, *, rest: str) -> Tensor:
    """Log-probs that a divergence over K candidates is taken of: with a "bucket" for the rest ([N, K+1]), or with the
    rest left out, which is to "renormalise" (a distribution over the K) or to "drop" (as they are).

    >>> outcomes(torch.tensor([[0.5, 0.25]]).log(), rest="renormalise").exp()
    tensor([[0.6667, 0.3333]])
    """
    return {"bucket": with_tail, "renormalise": lambda x: x.log_softmax(-1), "drop": lambda x: x}[rest](logp_NK)


def kl(p_logp_NK: Tensor, q_logp_NK: Tensor) -> Tensor:
    """KL(p‖q) = Σ_k p_k (log p_k - log q_k), over the last axis as given. Returns [N], nats.

    >>> kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])
    """
    return (p_logp_NK.exp() * (p_logp_NK - q_logp_NK)).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """Generalised JSD (GKD, arXiv:2306.13649): β KL(T‖m) + (1-β) KL(S‖m), m = β T + (1-β) S, 0 < β < 1, over the last
    axis as given. Returns [N], nats.

    >>> round(jensen_shannon(torch.tensor([[1.0, 1e-9]]).log(), torch.tensor([[1e-9, 1.0]]).log(), beta=0.5).item(), 3)
    0.693
    """
    beta = torch.as_tensor(beta, dtype=student.dtype, device=student.device)
    mixed = torch.logaddexp(teacher + beta.log(), student + torch.log1p(-beta))
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)
