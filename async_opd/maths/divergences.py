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


def head_and_tail(
    head: tuple[Tensor, Tensor],
    sampled: tuple[Tensor, Tensor],
    outside_N: Tensor,
    ratio_N: Tensor,
    *,
    at_most: float | None,
) -> tuple[Tensor, Tensor]:
    """Σ_{v in K} sg[p_v (log p_v - log q_v)] log p_v, and where the sampled token is `outside_N` of
    K, sg[ρ (log p - log q)] log p of it, [N]; and where a bound on the log-ratios acted, bool [N].
    `head` is (log p, log q) over K, [N, K], `sampled` that of the sampled token, [N].

    In the mean over sampled tokens the gradient is that of KL(p‖q) over the whole vocabulary, as
    long as K does not depend on the token: the Σ_v p_v ∇log p_v that the product rule would add is
    left out of both parts. Without ρ it is biased where tokens are stale, and so is the head's own
    derivative beside this tail. (Form of revisiting_opd's d10aedb with its head detached and
    with ρ; RECONSTRUCTION.)

    >>> student, teacher = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.25, 0.5]).log()
    >>> pairs = (student[None, :1], teacher[None, :1]), (student[1:], teacher[1:])
    >>> one = torch.ones(1)
    >>> head_and_tail(*pairs, one.bool(), one, at_most=None)
    (tensor([0.3748]), tensor([False]))
    """
    student_NK, teacher_NK = head
    student_N, teacher_N = sampled
    signal_NK, signal_N = (student_NK - teacher_NK).detach(), (student_N - teacher_N).detach()
    over_N = outside_N.new_zeros(len(outside_N))
    if at_most is not None:
        over_N = (signal_NK.abs() > at_most).any(-1) | (outside_N & (signal_N.abs() > at_most))
        signal_NK = signal_NK.clamp(-at_most, at_most)
        signal_N = signal_N.clamp(-at_most, at_most)
    inside_N = (student_NK.detach().exp() * signal_NK * student_NK).sum(-1)
    return inside_N + (ratio_N * signal_N * student_N).where(outside_N, 0), over_N


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
