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


def bounded_reverse_kl(
    student: Tensor, teacher: Tensor, *, at_most: float, whole: bool
) -> tuple[Tensor, Tensor]:
    """Σ_k p_k · clip(log p_k - log q_k, -c, c) of a student p and a teacher q, over the last axis
    as given, [N], nats; and where the bound acted, bool [N].

    The gradient is Σ_k p_k · clip(log p_k - log q_k, -c, c) · ∇log p_k, the mean of the sampled
    token's under the same bound, and not that of the value: there a candidate that is clipped would
    lose the 1 of the product rule that the others keep, and below c = 1 change its sign. Where p is
    the `whole` of a distribution Σ_k p_k ∇log p_k is 0, and the 1 is left out; else it is a part of
    what is clipped.

    >>> one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 1e-30]]).log()
    >>> bounded_reverse_kl(one, other, at_most=2.0, whole=True)
    (tensor([1.]), tensor([True]))
    """
    part, signal = 0 if whole else 1, (student - teacher).detach()
    over_N = ((signal + part).abs() > at_most).any(-1)
    clipped = (signal + part).clamp(-at_most, at_most)
    loss_N = (student.exp() * clipped - part * student.detach().exp()).sum(-1)
    return loss_N, over_N


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
