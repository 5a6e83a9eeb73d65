"""What a token or a trajectory is worth. Positive: to be made likelier. Unknown rewards are NaN."""

from typing import NamedTuple

from async_opd.maths import Tensor, segments

STD_FLOOR = 1e-6  # added to a standard deviation that is divided by


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """A = log π_T - log π (IW-OPD Eq. 4-6, arXiv:2606.22600; EXACT). Any shape.

    >>> reverse_kl(torch.tensor([-1.0]), torch.tensor([-0.5]))
    tensor([0.5000])
    """
    return teacher_logp - student_logp


def extrapolated(
    student_logp: Tensor, teacher_logp: Tensor, reference_logp: Tensor | None, *, lam: float
) -> Tensor:
    """A(λ) = (log π_T - log π) + (λ-1)(log π_T - log π_ref) (G-OPD Eq. 14, arXiv:2602.12125; EXACT,
    REPAIRED: printed is the cost, its negative). Any shape. λ = 1 needs no reference.

    >>> extrapolated(torch.tensor([-1.2]), torch.tensor([-0.7]), torch.tensor([-1.1]), lam=1.25)
    tensor([0.6000])
    """
    if lam == 1:
        return reverse_kl(student_logp, teacher_logp)
    assert reference_logp is not None
    return reverse_kl(student_logp, teacher_logp) + (lam - 1) * (teacher_logp - reference_logp)


def group_mean(value_SG: Tensor) -> Tensor:
    """Mean over the known values of a trajectory's group, [S]; 0 where none is known.

    >>> group_mean(torch.tensor([[1.0, 0.0, float("nan")]]))
    tensor([0.5000])
    """
    return value_SG.nan_to_num(0).sum(1) / (~value_SG.isnan()).sum(1).clamp(min=1)


def proximal(advantage: Tensor, *, alpha: float) -> Tensor:
    """log(α e^A + 1 - α), the log-ratio to a teacher that is mixed with the student, at least
    log(1 - α) (TOP-D Eq. 5, arXiv:2607.04751; EXACT). Any shape. α = 1 is A.

    >>> proximal(torch.tensor([0.5, -300.0]), alpha=0.2)
    tensor([ 0.1220, -0.2231])
    """
    if alpha == 1:
        return advantage
    share = advantage.new_tensor(alpha)
    return (advantage + share.log()).logaddexp((-share).log1p())


def with_future(value_N: Tensor, segment_N: Tensor, count: int) -> Tensor:
    """R_k = r_k + the mean of r_j over the later tokens j of its trajectory (TOP-D Eq. 7; EXACT);
    r_k of the last, which has none (RECONSTRUCTION). [N].

    >>> with_future(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 0]), 1)
    tensor([4., 6., 4.])
    """
    length_N = segments.lengths(segment_N, count)[segment_N]
    later_N = length_N - segments.places(segment_N) - 1
    wide_N = value_N.double()  # the last tokens' are small differences of large sums
    total_N = segments.sums(wide_N, segment_N, count)[segment_N]
    behind_N = total_N - segments.before(wide_N, segment_N) - wide_N
    return (wide_N + (behind_N / later_N.clamp(min=1)).where(later_N > 0, 0)).to(value_N.dtype)


def standardised(
    value_N: Tensor, group_N: Tensor, number: Tensor, total: Tensor, squares: Tensor
) -> Tensor:
    """(x - μ)/(σ + 1e-6), by number, sum and sum of squares of each token's group, one for each
    group; population σ (TOP-D Eq. 8; EXACT but for the floor and kind of σ). [N].

    >>> one = torch.tensor([2.0])
    >>> standardised(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), one, 2 * one, 5 * one)
    tensor([-1.0000,  1.0000])
    """
    mean = total / number.clamp(min=1)
    std = (squares / number.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    return ((value_N - mean[group_N]) / (std[group_N] + STD_FLOOR)).to(value_N.dtype)


def fixed_negative(entropy_N: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """A = -1/2 - (H - H_min) / (2 (H_max - H_min)), in [-1, -1/2]; -1/2 where all are equal (OPSA,
    arXiv:2608.31046; SECOND-HAND). [N].

    >>> fixed_negative(torch.tensor([0.1, 2.0]), torch.tensor(0.1), torch.tensor(2.0))
    tensor([-0.5000, -1.0000])
    """
    range_ = (largest - least).where(largest > least, 1)
    share_N = ((entropy_N - least) / range_).clamp(0, 1)
    return -(1 + share_N.to(entropy_N.dtype)) / 2


def within_group(reward_S: Tensor, group_reward_SG: Tensor) -> Tensor:
    """a = (r - μ) / (σ + 1e-6) over the known rewards of a trajectory's group; 0 where its own is
    unknown, and where all are alike. [S].

    Population σ, so a group of one right and one wrong gives ±1. (SG-OPD 3.1, arXiv:2606.09304;
    EXACT but for σ: the paper gives neither its floor nor whether it divides by G or by G - 1.)

    >>> within_group(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([ 1.0000, -1.0000])
    """
    known_SG = ~group_reward_SG.isnan()
    count_S = known_SG.sum(1).clamp(min=1)
    mean_S = group_mean(group_reward_SG)
    apart_SG = (group_reward_SG - mean_S[:, None]).where(known_SG, 0)
    std_S = (apart_SG.square().sum(1) / count_S).sqrt()
    # the mean of rewards that are alike is rounded, and that is no contrast
    alike_S = ((group_reward_SG == reward_S[:, None]) | ~known_SG).all(1)
    return ((reward_S - mean_S) / (std_S + STD_FLOOR)).where(~(reward_S.isnan() | alike_S), 0)


def length_penalised(reward: Tensor, length: Tensor, cap_S: Tensor, *, penalty: float) -> Tensor:
    """r = reward - λ · |y|/L_max; NaN where unknown. [S], or [S, G] of each trajectory's group.

    >>> rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([5, 10])
    >>> length_penalised(rewards, lengths, torch.tensor([10, 10]), penalty=0.5)
    tensor([ 0.7500, -0.5000])
    """
    return reward - penalty * length / (cap_S if reward.ndim == 1 else cap_S[:, None])


def length_aware(reward_S: Tensor, length_S: Tensor, cap_S: Tensor, *, bonus: float) -> Tensor:
    """r = reward · (1 + β(1 - |y|/L_max)) (EGRSD Eq. 2, arXiv:2605.13255; EXACT where the reward
    is 1[right], the paper's); NaN where unknown. [S].

    >>> rewards, lengths = torch.tensor([1.0, 0.0]), torch.tensor([5, 5])
    >>> length_aware(rewards, lengths, torch.tensor([10, 10]), bonus=0.5)
    tensor([1.2500, 0.0000])
    """
    return reward_S * (1 + bonus * (1 - length_S / cap_S))


class Moments(NamedTuple):
    """Number, mean and Σ(x - mean)² of all values so far (Welford)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def with_sums(self, count: float, total: float, squares: float) -> "Moments":
        """After `count` more values of sum `total` and sum of squares `squares` (Chan's merge).

        >>> Moments().with_sums(2, 4.0, 10.0).with_sums(1, 5.0, 25.0)  # 1, 3, then 5
        Moments(number=3.0, mean=3.0, squares=8.0)
        """
        if not count:
            return self
        both, mean = self.number + count, total / count
        apart = mean - self.mean
        within = max(squares - total * mean, 0.0)
        return Moments(
            both,
            self.mean + apart * count / both,
            self.squares + within + apart * apart * self.number * count / both,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 0 of nothing.

        >>> Moments(2, 2.0, 2.0).std
        1.0
        """
        return (self.squares / self.number) ** 0.5 if self.number else 0.0


def whitened(
    value_S: Tensor, past: Moments, *, step: int, warmup_steps: int, warmup_mean: float
) -> Tensor:
    """A = (r - r̄)/(σ + 1e-6) by the moments of all past steps; A = r - `warmup_mean` up to step
    `warmup_steps`, and for as long as all were alike, but for rounding; 0 where unknown. [S].
    (EGRSD Eq. 3; EXACT but for the floor of σ.)

    >>> rewards = torch.tensor([1.0, float("nan")])
    >>> whitened(rewards, Moments(), step=1, warmup_steps=10, warmup_mean=0.5)
    tensor([0.5000, 0.0000])
    """
    warm = step > warmup_steps and past.std > STD_FLOOR
    advantage_S = (value_S - past.mean) / (past.std + STD_FLOOR) if warm else value_S - warmup_mean
    return advantage_S.nan_to_num(0.0)
