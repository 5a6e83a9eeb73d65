"""Importance ratios of the live student to the behaviour policy: detached multipliers that correct staleness."""

from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # nats; e^20 is already far outside any bound, and fp32 stays finite


def ratio(student_logp_N: Tensor, behaviour_logp_N: Tensor, *, truncate: float | None = None) -> Tensor:
    """ρ = sg[π_student / π_behaviour] per token, or min(ρ, c) when `truncate` = c is given. Returns [N], detached.

    Log-ratios are clamped to ±20 nats, as the G-OPD code does (arXiv:2602.12125).

    >>> ratio(torch.tensor([0.5, 0.9]).log(), torch.tensor([0.25, 0.9]).log(), truncate=1.5)
    tensor([1.5000, 1.0000])
    """
    log_ratio_N = (student_logp_N - behaviour_logp_N).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio_N.exp() if truncate is None else log_ratio_N.exp().clamp(max=truncate)


def effective_sample_size(total: float, squares: float, count: float) -> float:
    """Share of `count` weights that count: (Σ w)² / (n Σ w²), 1 when all are equal. Takes Σ w, Σ w² and n.

    >>> effective_sample_size(4.0, 16.0, 4)
    0.25
    """
    return total * total / (count * squares) if squares else 0.0
