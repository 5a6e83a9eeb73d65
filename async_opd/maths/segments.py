"""Sums, minima and places inside each of the S trajectories that N response tokens belong to.

`segment_N` holds the trajectory of each token, int64 in [0, S); the tokens of one stand together
and in order.
"""

from async_opd.maths import Tensor


def lengths(segment_N: Tensor, segments: int) -> Tensor:
    """Tokens of each trajectory, int64 [S].

    >>> lengths(torch.tensor([0, 0, 2]), 3)
    tensor([2, 0, 1])
    """
    return segment_N.bincount(minlength=segments)


def places(segment_N: Tensor) -> Tensor:
    """Place of each token in its trajectory, from 0, int64 [N].

    >>> places(torch.tensor([0, 0, 2, 2, 2]))
    tensor([0, 1, 0, 1, 2])
    """
    import torch

    return torch.arange(len(segment_N), device=segment_N.device) - _first(segment_N)


def ranks(value_N: Tensor, segment_N: Tensor) -> Tensor:
    """Place of each token among those of its trajectory by value, the lowest 0, the first of equals
    first; int64 [N].

    >>> ranks(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1]))
    tensor([2, 0, 1, 0])
    """
    by_value_N = value_N.argsort(stable=True)
    order_N = by_value_N[segment_N[by_value_N].argsort(stable=True)]
    rank_N = segment_N.new_empty(len(segment_N))
    rank_N[order_N] = places(segment_N)
    return rank_N


def sums(value_N: Tensor, segment_N: Tensor, segments: int) -> Tensor:
    """Σ over each trajectory, [S]; 0 for one without tokens; summed in float64.

    >>> sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([3., 4.])
    """
    wide_N = value_N.double()
    return wide_N.new_zeros(segments).index_add_(0, segment_N, wide_N).to(value_N.dtype)


def before(value_N: Tensor, segment_N: Tensor) -> Tensor:
    """Σ_{k < t} over the tokens of the same trajectory, [N]; summed in float64.

    >>> before(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]))
    tensor([0., 1., 0.])
    """
    ahead_N = value_N.double().cumsum(0) - value_N
    return (ahead_N - ahead_N[_first(segment_N)]).to(value_N.dtype)


def means(value_N: Tensor, segment_N: Tensor, segments: int) -> Tensor:
    """Mean over each trajectory, [S]; 0 for one without tokens.

    >>> means(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([1.5000, 4.0000])
    """
    return sums(value_N, segment_N, segments) / lengths(segment_N, segments).clamp(min=1)


def largest(value_N: Tensor, segment_N: Tensor, segments: int) -> Tensor:
    """Largest of each trajectory's values ≥ 0, [S]; 0 for one without tokens.

    >>> largest(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 3)
    tensor([2., 0., 4.])
    """
    return value_N.new_zeros(segments).scatter_reduce_(0, segment_N, value_N, "amax")


def lookahead_minimum(value_N: Tensor, segment_N: Tensor, window: int) -> Tensor:
    """min of v_t … v_{t+window}, as far as the trajectory goes, [N].

    >>> lookahead_minimum(torch.tensor([3.0, 2.0, 5.0, 1.0]), torch.tensor([0, 0, 0, 1]), 1)
    tensor([2., 2., 5., 1.])
    """
    least_N = value_N.clone()
    for ahead in range(1, min(window, len(value_N) - 1) + 1):
        same = segment_N[ahead:] == segment_N[:-ahead]
        least_N[:-ahead] = value_N[ahead:].minimum(least_N[:-ahead]).where(same, least_N[:-ahead])
    return least_N


def _first(segment_N: Tensor) -> Tensor:
    """Index in N of the first token of each token's trajectory."""
    import torch

    return torch.searchsorted(segment_N.contiguous(), segment_N.contiguous())
