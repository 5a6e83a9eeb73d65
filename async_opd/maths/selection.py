"""Which tokens of each trajectory are trained on."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from async_opd.maths import Tensor, segments

ROUNDING = 1e-9  # 0.29 · 50 is a hair below 14.5 in binary, and 0.07 · 100 a hair above 7
# decisions compared with all other tokens at once: memory is linear in the response
SIMILARITY_ROWS = 1024


def count(share: float, of: int) -> int:
    """max(1, share · of, halves rounded up), never more than there are.

    >>> count(0.2, 8), count(0.5, 5), count(0.01, 3), count(0.2, 0)
    (2, 3, 1, 0)
    """
    return min(of, max(1, int(share * of + 0.5 + ROUNDING)))


def largest(value_T: Tensor, how_many: int) -> Tensor:
    """The `how_many` largest, the first of equals first; bool [T].

    >>> largest(torch.tensor([1.0, 3.0, 3.0]), 1)
    tensor([False,  True, False])
    """
    chosen_T = value_T.new_zeros(len(value_T)).bool()
    chosen_T[value_T.argsort(descending=True, stable=True)[:how_many]] = True
    return chosen_T


def part(segment_N: Tensor, count_S: Tensor, *, share: float, end: bool) -> Tensor:
    """The first (or at the `end` the last) ⌈share · length⌉ of each trajectory's tokens, `count_S`
    [S] of them; bool [N].

    >>> part(torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]), share=0.4, end=False)
    tensor([ True,  True, False,  True])
    """
    place_N = segments.places(segment_N)
    kept_N = rounded_up(count_S, share)[segment_N]
    return place_N >= count_S[segment_N] - kept_N if end else place_N < kept_N


def lowest(value_N: Tensor, segment_N: Tensor, count: int, *, share: float) -> Tensor:
    """The ⌈share · length⌉ lowest of each trajectory, the first of equals first; bool [N].

    >>> lowest(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1]), 2, share=0.4)
    tensor([False,  True,  True,  True])
    """
    length_S = segments.lengths(segment_N, count)
    return segments.ranks(value_N, segment_N) < rounded_up(length_S, share)[segment_N]


def at_random(segment_N: Tensor, key_S: Tensor, *, share: float) -> Tensor:
    """A share of each trajectory's tokens, chosen by a hash of its key and their place: the same in
    every batch.

    >>> at_random(torch.tensor([0, 0, 0, 0]), torch.tensor([7]), share=0.5).sum()
    tensor(2)
    """
    place_N = segments.places(segment_N)
    # int64 wraps around, here and below
    mixed_N = key_S[segment_N] * 0x1E3779B97F4A7C15 + (place_N + 1) * 0x3F58476D1CE4E5B9
    for shift, factor in ((30, 0x14D049BB133111EB), (27, 0x369DEA0F31A53F85)):
        mixed_N = (mixed_N ^ (mixed_N >> shift)) * factor
    rank_N = segments.ranks(mixed_N & 0xFFFFFFFF, segment_N)
    return rank_N < kept(segments.lengths(segment_N, len(key_S)), share)[segment_N]


def rounded_up(length_S: Tensor, share: float) -> Tensor:
    """⌈share · length⌉, at least 1, int64 [S].

    >>> rounded_up(torch.tensor([8, 5, 1]), 0.3)
    tensor([3, 2, 1])
    """
    return (share * length_S.double() - ROUNDING).ceil().long().clamp(min=1)


def kept(length_S: Tensor, share: float) -> Tensor:
    """`count` of each length, int64 [S].

    >>> kept(torch.tensor([8, 5, 1]), 0.2)
    tensor([2, 1, 1])
    """
    return (share * length_S.double() + 0.5 + ROUNDING).long().clamp(min=1).minimum(length_S)


def evidence_scores(hidden_TD: Tensor, gap_T: Tensor, decision_T: Tensor) -> Tensor:
    """s = â · (1 + d̂) of the tokens that are no decisions, in order (DEAR Eq. 6-8,
    arXiv:2606.22830). [T - |D|].

    a: the largest cosine with the hidden state of any decision; d = |log π - log π_T| (`gap_T`);
    hats: min-max over the tokens that are no decisions (RECONSTRUCTION: the set is not stated), 0
    where all are equal.

    >>> hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> decisions = torch.tensor([True, False, False])
    >>> evidence_scores(hidden, torch.tensor([0.0, 2.0, 4.0]), decisions)
    tensor([1., 0.])
    """
    import torch

    unit_TD = torch.nn.functional.normalize(hidden_TD.float(), dim=1)
    other_ED = unit_TD[~decision_T]
    nearest_E = other_ED.new_full((len(other_ED),), -torch.inf)
    for rows_RD in unit_TD[decision_T].split(SIMILARITY_ROWS):
        nearest_E = nearest_E.maximum((other_ED @ rows_RD.T).amax(1))
    return _min_max(nearest_E) * (1 + _min_max(gap_T[~decision_T]))


def decisions_and_evidence(
    entropy_N: Tensor,
    gap_N: Tensor,
    hidden_ND: Tensor,
    segment_N: Tensor,
    segments_count: int,
    *,
    p: float,
    q: float,
) -> Tensor:
    """D ∪ E of each trajectory: the share p of its tokens where the student is least certain, and
    the share q of the rest that scores highest as evidence for them (DEAR Eq. 3-8, Algorithm 1;
    EXACT but for `count` in place of a quantile). bool [N].

    >>> one = torch.ones(2, 1)
    >>> entropies, segments = torch.tensor([2.0, 1.0]), torch.tensor([0, 0])
    >>> decisions_and_evidence(entropies, one[:, 0], one, segments, 1, p=0.5, q=0.5)
    tensor([True, True])
    """
    import torch

    sizes = segments.lengths(segment_N, segments_count).tolist()
    parts: list[Tensor] = []
    for entropy_T, gap_T, hidden_TD in zip(
        *(x.split(sizes) for x in (entropy_N, gap_N, hidden_ND)), strict=True
    ):
        chosen_T = largest(entropy_T, count(p, len(entropy_T)))
        rest = int((~chosen_T).sum())
        if rest:
            scores_E = evidence_scores(hidden_TD, gap_T, chosen_T)
            chosen_T = chosen_T.masked_scatter(~chosen_T, largest(scores_E, count(q, rest)))
        parts.append(chosen_T)
    return torch.cat(parts)


def _min_max(value_E: Tensor) -> Tensor:
    low, high = value_E.min(), value_E.max()
    return (value_E - low) / (high - low).where(high > low, 1)
