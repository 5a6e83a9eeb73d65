"""Weights of tokens by what student and teacher say of them. All are detached by their callers'
inputs."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from async_opd.maths import Tensor, segments


def agreement(trust_N: Tensor, advantage_N: Tensor) -> Tensor:
    """g = 1[a₁ · a₂ > 0] (SG-OPD Eq. 4, arXiv:2606.09304; EXACT). bool [N].

    >>> agreement(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.5, -0.5, 0.5]))
    tensor([ True, False, False])
    """
    return trust_N * advantage_N > 0


def magnitude(advantage_N: Tensor, *, tau: float) -> Tensor:
    """φ = min(1, τ/|a|), 1 where a = 0; before it is divided by its mean (SG-OPD Eq. 9; EXACT).
    [N].

    >>> magnitude(torch.tensor([0.5, -4.0, 0.0]), tau=1.0)
    tensor([1.0000, 0.2500, 1.0000])
    """
    return tau / advantage_N.abs().clamp(min=tau)


def prefix_discrepancy(
    advantage_N: Tensor, segment_N: Tensor, count: int, *, gamma: float, through_last: bool = True
) -> Tensor:
    """r = 1 + γ · (1 - Σ_{k < t}|A_k| / Σ_k|A_k|), the quotient in [0, 1] (IW-OPD Eq. 14-17,
    arXiv:2606.22600). [N].

    EXACT (code) where the sum below runs over all tokens, plus 1e-8; EXACT (paper) where it stops
    before the last.

    >>> prefix_discrepancy(torch.tensor([1.0, -3.0]), torch.tensor([0, 0]), 1, gamma=0.5)
    tensor([1.5000, 1.3750])
    """
    size_N = advantage_N.abs()
    total_N = segments.sums(size_N, segment_N, count)[segment_N]
    if not through_last:
        last_N = segments.places(segment_N) == segments.lengths(segment_N, count)[segment_N] - 1
        total_N = total_N - segments.sums(size_N * last_N, segment_N, count)[segment_N]
    return 1 + gamma * (1 - segments.before(size_N, segment_N) / (total_N + 1e-8)).clamp(0, 1)


def direction(advantage_N: Tensor, sign_N: Tensor, *, clip: float) -> Tensor:
    """w = clip(exp(D · δ), 1-ε, 1+ε), D the sign of the trajectory's advantage (EGRSD Eq. 4-5,
    arXiv:2605.13255). [N].

    >>> direction(torch.tensor([0.1, 3.0]), torch.tensor([1.0, -1.0]), clip=0.2)
    tensor([1.1052, 0.8000])
    """
    return (sign_N * advantage_N).clamp(-20, 20).exp().clamp(1 - clip, 1 + clip)


def certainty(entropy_N: Tensor, largest: Tensor, *, gamma: float, floor: float) -> Tensor:
    """ω = clip(1 - γ · H / max(H_max, 1 nat), floor, 1) (EGRSD Eq. 6-7; EXACT). [N].

    >>> certainty(torch.tensor([0.3, 3.0]), torch.tensor(3.0), gamma=0.3, floor=0.1)
    tensor([0.9700, 0.7000])
    """
    return (1 - gamma * entropy_N / largest.clamp(min=1.0)).clamp(floor, 1)


def freshness(drift_S: Tensor, age_S: Tensor, *, alpha: float, least: float) -> Tensor:
    """w = max(0, f - ξ), f = exp(-α √D) / (τ + 1), of how far the student has moved on a response,
    D in nats, and of its age τ in optimizer steps (f-OPD Eq. 10-12, arXiv:2605.17862; EXACT). [S].

    >>> freshness(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), alpha=1.0, least=0.1)
    tensor([0.4000, 0.0839])
    """
    return ((-alpha * drift_S.sqrt()).exp() / (age_S + 1) - least).clamp(min=0)


def likely_wrong(
    excess_N: Tensor, segment_N: Tensor, count: int, *, tau: float, clip: float
) -> Tensor:
    """w = exp(mean over K of min(l, clip)), K the tokens whose excess l = log π - log π_T is above
    τ, 1 where there is none (ReNIO Eq. 4-7, arXiv:2606.23104; EXACT). [S], before its mean is
    divided out.

    >>> excess, segment_N = torch.tensor([2.0, 0.1, 0.5]), torch.tensor([0, 0, 1])
    >>> likely_wrong(excess, segment_N, 2, tau=1.0, clip=3.0)
    tensor([7.3891, 1.0000])
    """
    key_N = (excess_N > tau).to(excess_N.dtype)
    keys_S = segments.sums(key_N, segment_N, count)
    total_S = segments.sums(excess_N.clamp(max=clip) * key_N, segment_N, count)
    return (total_S / keys_S.clamp(min=1)).exp()


def verdict_agrees(trust_S: Tensor, gap_S: Tensor, known_S: Tensor, *, margin: float) -> Tensor:
    """g = 1 where a > 0 and Σ_t A_t > d, or a ≤ 0 and Σ_t A_t < -d, of the reward a among its
    group's and the response's log π_T - log π (RG-OPD Eq. 1-2, arXiv:2607.04037; EXACT); 0 where
    the verdict is not `known_S` (RECONSTRUCTION). bool [S].

    >>> trust, gap = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, -3.0, -3.0])
    >>> verdict_agrees(trust, gap, torch.tensor([True, True, True]), margin=0.0)
    tensor([ True, False,  True])
    """
    return known_S & ((gap_S > margin).where(trust_S > 0, gap_S < -margin))


def drift(
    student_logp_N: Tensor, behaviour_logp_N: Tensor, segment_N: Tensor, *, block: int, tau: float
) -> Tensor:
    """g = exp(-τ|s|), s the mean of log π - log π_behaviour over the token's block of `block`
    tokens; before it is divided by its mean (blockwise drift gate, arXiv:2606.24084 Eq. 1-3;
    EXACT). [N].

    >>> drift(torch.tensor([0.2, -0.4]), torch.zeros(2), torch.tensor([0, 0]), block=2, tau=1.0)
    tensor([0.9048, 0.9048])
    """
    place_N = segments.places(segment_N)
    longest = int(place_N.max()) + 1 if len(place_N) else 1
    block_N = (segment_N * longest + place_N // block).unique_consecutive(return_inverse=True)[1]
    blocks = int(block_N[-1]) + 1 if len(block_N) else 0
    total = segments.sums(student_logp_N - behaviour_logp_N, block_N, blocks)
    return (-tau * (total / segments.lengths(block_N, blocks)).abs()).exp()[block_N]
