"""Divergences between student and teacher over K candidates a position plus one bucket for the
rest."""

from async_opd.maths import Tensor


def outcomes(logp_NK: Tensor, tail_N: Tensor | None, *, rest: str) -> Tensor:
    """Log-probs that a divergence over K candidates is taken of: with the tail, the log-mass of
    everything outside, as one more outcome, a "bucket" ([N, K+1]), or with the rest left out, which
    is to "renormalise" (a distribution over the K) or to "drop" (as they are).

    >>> outcomes(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log(), rest="bucket").exp()
    tensor([[0.5000, 0.2500, 0.2500]])
    >>> outcomes(torch.tensor([[0.5, 0.25]]).log(), None, rest="renormalise").exp()
    tensor([[0.6667, 0.3333]])
    """
    if rest == "bucket":
        import torch

        assert tail_N is not None
        return torch.cat([logp_NK, tail_N[:, None]], dim=-1)
    return logp_NK.log_softmax(-1) if rest == "renormalise" else logp_NK


def kl(p_logp_NK: Tensor, q_logp_NK: Tensor) -> Tensor:
    """KL(p‖q) = Σ_k p_k (log p_k - log q_k), over the last axis as given. Returns [N], nats.

    >>> kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])
    """
    return (p_logp_NK.exp() * (p_logp_NK - q_logp_NK)).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """Generalised JSD (GKD, arXiv:2306.13649): β KL(T‖m) + (1-β) KL(S‖m), m = β T + (1-β) S, 0 < β
    < 1, over the last axis as given. Returns [N], nats.

    >>> one, other = torch.tensor([[1.0, 1e-9]]).log(), torch.tensor([[1e-9, 1.0]]).log()
    >>> round(jensen_shannon(one, other, beta=0.5).item(), 3)
    0.693
    """
    share = student.new_tensor(beta)
    mixed = (teacher + share.log()).logaddexp(student + (-share).log1p())
    return share * kl(teacher, mixed) + (1 - share) * kl(student, mixed)
