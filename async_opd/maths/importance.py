"""Importance ratios of the live student to the behaviour policy: what corrects staleness.

Log-ratios are clamped to ±20 nats, as the G-OPD code does (arXiv:2602.12125).
"""

from async_opd.maths import Tensor, segments

LOG_RATIO_LIMIT = 20.0  # nats; e^20 is already far outside any bound, and fp32 stays finite


def ratio(student_logp_N: Tensor, behaviour_logp_N: Tensor) -> Tensor:
    """ρ = π_student / π_behaviour of each token, of any shape; carries gradient.

    >>> ratio(torch.tensor([0.5, 0.9]).log(), torch.tensor([0.25, 0.9]).log())
    tensor([2., 1.])
    """
    return _exp(student_logp_N - behaviour_logp_N)


def sequence_ratio(
    student_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    segment_N: Tensor,
    count: int,
    *,
    instead_NM: Tensor | None = None,
) -> Tensor:
    """Π_t ρ_t over the token's trajectory, [N]; or of those with one of M others in place of the
    t-th, by their log-ratios `instead_NM`, [N, M].

    >>> student, behaviour = torch.tensor([0.5, 0.3]).log(), torch.tensor([0.25, 0.2]).log()
    >>> sequence_ratio(student, behaviour, torch.tensor([0, 0]), 1)
    tensor([3., 3.])
    """
    return _exp(_log_product(student_logp_N - behaviour_logp_N, segment_N, count, instead_NM))


def geometric_ratio(
    student_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    segment_N: Tensor,
    count: int,
    *,
    instead_NM: Tensor | None = None,
) -> Tensor:
    """(Π_t ρ_t)^(1/T) over the token's trajectory of T tokens, [N] or [N, M] as in
    `sequence_ratio`.

    >>> current, behaviour = torch.tensor([0.5, 0.4]).log(), torch.tensor([0.25, 0.2]).log()
    >>> geometric_ratio(current, behaviour, torch.tensor([0, 0]), 1)
    tensor([2., 2.])
    """
    total = _log_product(student_logp_N - behaviour_logp_N, segment_N, count, instead_NM)
    length_N = segments.lengths(segment_N, count)[segment_N]
    return _exp(total / (length_N if instead_NM is None else length_N[:, None]))


def prefix_ratio(student_logp_N: Tensor, behaviour_logp_N: Tensor, segment_N: Tensor) -> Tensor:
    """Π_{k < t} ρ_k: of the tokens before t, the state that a dense term at t is taken in. Returns
    [N].

    >>> current, behaviour = torch.tensor([0.5, 0.9]).log(), torch.tensor([0.25, 0.1]).log()
    >>> prefix_ratio(current, behaviour, torch.tensor([0, 0]))
    tensor([1., 2.])
    """
    return _exp(segments.before(student_logp_N - behaviour_logp_N, segment_N))


def prefix_product(
    student_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    segment_N: Tensor,
    *,
    instead_NM: Tensor | None = None,
) -> Tensor:
    """C_t = Π_{k ≤ t} ρ_k, the ratio of coming to t and saying what was said there, [N]; or of one
    of M others said there, by their log-ratios `instead_NM`, [N, M] (PNPO Eq. 1, arXiv:2608.01418;
    EXACT).

    >>> current, behaviour = torch.tensor([0.5, 0.4]).log(), torch.tensor([0.25, 0.2]).log()
    >>> prefix_product(current, behaviour, torch.tensor([0, 0]))
    tensor([2., 4.])
    """
    return _exp(_log_prefix(student_logp_N - behaviour_logp_N, segment_N, instead_NM))


def normalised_prefix(
    student_logp_N: Tensor,
    behaviour_logp_N: Tensor,
    segment_N: Tensor,
    *,
    instead_NM: Tensor | None = None,
) -> Tensor:
    """w_t = C_t^(1/t), t from 1, [N] or [N, M] as in `prefix_product` (PNPO Eq. 7; EXACT).

    >>> current, behaviour = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.2]).log()
    >>> normalised_prefix(current, behaviour, torch.tensor([0, 0]))
    tensor([2.0000, 1.4142])
    """
    log_ratio = _log_prefix(student_logp_N - behaviour_logp_N, segment_N, instead_NM)
    place_N = segments.places(segment_N) + 1
    return _exp(log_ratio / (place_N if instead_NM is None else place_N[:, None]))


def narrowing(
    ratio: Tensor, segment_N: Tensor, count: int, *, below: float, above: float
) -> Tensor:
    """M_t = 1[1 - below · √(L/t) ≤ ratio ≤ 1 + above · √(L/t)], t from 1 in a trajectory of L
    tokens; bool, [N] or [N, M] (PNPO Eq. 8-9; EXACT).

    >>> narrowing(torch.full((4,), 1.3), torch.zeros(4).long(), 1, below=0.2, above=0.2)
    tensor([ True, False, False, False])
    """
    length_N = segments.lengths(segment_N, count)[segment_N]
    width = (length_N / (segments.places(segment_N) + 1)).sqrt().to(ratio.dtype)
    width = width.reshape(-1, *(1,) * (ratio.ndim - 1))
    return (ratio >= 1 - below * width) & (ratio <= 1 + above * width)


def log_ratio(student_logp: Tensor, behaviour_logp: Tensor) -> Tensor:
    """log ρ within ±20 nats, of any shape.

    >>> log_ratio(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -90.0]))
    tensor([ 0.5000, 20.0000])
    """
    return (student_logp - behaviour_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def moved(student_logp_N: Tensor, behaviour_logp_N: Tensor) -> Tensor:
    """κ = ρ log ρ - ρ + 1 ≥ 0, whose mean over tokens of the behaviour policy is KL(π‖π_behaviour)
    (f-OPD's D^roll, arXiv:2605.17862, by cached log-probs; RECONSTRUCTION: the paper has the whole
    vocabulary). [N], nats.

    >>> moved(torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.2]).log())
    tensor([0.3863, 0.0000])
    """
    log_N = log_ratio(student_logp_N, behaviour_logp_N)
    return (log_N * log_N.exp() - log_N.expm1()).clamp(min=0)


def truncate(
    ratio: Tensor, *, at_most: float | None, between: tuple[float, float] | None
) -> Tensor:
    """min(ρ, c), then ρ · 1[a ≤ ρ ≤ b], each where it is given. Any shape.

    >>> truncate(torch.tensor([0.1, 1.0, 3.0]), at_most=2.0, between=(0.5, 5.0))
    tensor([0., 1., 2.])
    """
    inside = 1.0 if between is None else (ratio >= between[0]) & (ratio <= between[1])
    return (ratio if at_most is None else ratio.clamp(max=at_most)) * inside


def clipped(ratio: Tensor, advantage: Tensor, *, clip: float, dual_clip: float | None) -> Tensor:
    """The factor f for which PPO's surrogate is f · A; gradient flows in ρ where it is not clipped.
    Any shape.

    min(ρA, clip(ρ, 1-ε, 1+ε)A) = A · min(ρ, 1+ε) where A ≥ 0, else A · max(ρ, 1-ε); a dual clip c >
    1 makes the latter A · min(max(ρ, 1-ε), c) (arXiv:1912.09729 Eq. 5).

    >>> ratios, advantages = torch.tensor([1.5, 1.5, 9.0]), torch.tensor([1.0, -1.0, -1.0])
    >>> clipped(ratios, advantages, clip=0.2, dual_clip=3.0)
    tensor([1.2000, 1.5000, 3.0000])
    """
    lowered = ratio.clamp(max=1 + clip)
    return lowered.where(advantage >= 0, ratio.clamp(min=1 - clip, max=dual_clip))


def effective_sample_size(total: float, squares: float, count: float) -> float:
    """Share of `count` weights that count: (Σ w)² / (n Σ w²), 1 when all are equal. Takes Σ w, Σ w²
    and n.

    >>> effective_sample_size(4.0, 16.0, 4)
    0.25
    """
    return total * total / (count * squares) if squares else 0.0


def _log_product(
    log_ratio_N: Tensor, segment_N: Tensor, count: int, instead_NM: Tensor | None
) -> Tensor:
    """Σ_t log ρ_t of the token's trajectory, unclamped: of each of the others in its place, where
    there are such."""
    total_N = segments.sums(log_ratio_N, segment_N, count)[segment_N]
    return total_N if instead_NM is None else (total_N - log_ratio_N)[:, None] + instead_NM


def _log_prefix(log_ratio_N: Tensor, segment_N: Tensor, instead_NM: Tensor | None) -> Tensor:
    """Σ_{k ≤ t} log ρ_k, unclamped: with each of the others in place of the t-th, where there are
    such."""
    before_N = segments.before(log_ratio_N, segment_N)
    return before_N + log_ratio_N if instead_NM is None else before_N[:, None] + instead_NM


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
