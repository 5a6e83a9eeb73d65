from math import sqrt

import pytest
import torch
from batches import LENGTHS, batch, ragged, with_statistics

from async_opd.maths.selection import evidence_scores
from async_opd.objectives.dear import Dear

ENTROPY = [2.0, 0.1, 1.8, 0.05, 0.2, 0.1, 0.3, 0.15, 0.02, 0.4]
GAP = [0.5, 3, 0.2, 0.1, 1, 2, 4, 0.3, 0.05, 2.5]
HIDDEN = [
    (1, 0),
    (0.9, 0.1),
    (0, 1),
    (0.1, 0.9),
    (1, 0.2),
    (-1, 0),
    (0, -1),
    (0.7, 0.7),
    (0.95, 0.05),
    (0.2, 1),
]


def of(entropy, gap, hidden, **more):
    """A batch whose student and teacher are `gap` nats apart, now above and now below."""
    teacher = [-5.0 + (g if i % 2 else -g) for i, g in enumerate(gap)]
    return batch([-5.0] * len(gap), teacher, student_entropy_N=entropy, hidden_ND=hidden, **more)


def selected(objective, given):
    return torch.nonzero(objective.loss(given).selected_N)[:, 0].tolist()


def test_decisions_and_evidence_are_the_published_ones():
    given = of(ENTROPY, GAP, HIDDEN)
    assert selected(Dear(), given) == [0, 1, 2, 9]  # D = {0, 2}, E = {1, 9}
    # the largest gap, but no cosine
    assert given.teacher_logp_N[6] == -9 and 6 not in selected(Dear(), given)


def test_the_scores_of_evidence_are_the_published_ones():
    decision = torch.tensor([i in (0, 2) for i in range(10)])
    got = evidence_scores(torch.tensor(HIDDEN), torch.tensor(GAP), decision)
    # of tokens 1, 3, 4, …, 9
    expected = [1.738554, 1.007858, 1.2181, 0, 0, 0.752901, 1.0, 1.590988]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def min_max(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def by_loop(entropy, gap, hidden, p, q):
    """D ∪ E of one response, by sorting lists."""
    count = lambda share, of: min(of, max(1, int(share * of + 0.5)))  # noqa: E731
    tokens = range(len(entropy))
    chosen = sorted(tokens, key=lambda t: (-entropy[t], t))[: count(p, len(entropy))]
    rest = [t for t in tokens if t not in chosen]
    if rest:
        unit = [[x / sqrt(sum(y * y for y in h)) for x in h] for h in hidden]
        near = [
            max(sum(a * b for a, b in zip(unit[i], unit[j], strict=True)) for i in chosen)
            for j in rest
        ]
        pairs = zip(min_max(near), min_max([gap[j] for j in rest]), strict=True)
        score = dict(zip(rest, [a * (1 + d) for a, d in pairs], strict=True))
        chosen += sorted(rest, key=lambda j: (-score[j], j))[: count(q, len(rest))]
    return [t in chosen for t in tokens]


@pytest.mark.parametrize(("p", "q"), [(0.2, 0.2), (0.5, 0.1), (0.01, 1.0), (1.0, 0.2), (0.3, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_selection_is_that_of_a_loop_over_each_trajectory(p, q, seed):
    hidden_ND = torch.randn(sum(LENGTHS), 4, generator=torch.Generator().manual_seed(seed)).double()
    given, expected = ragged(seed, hidden_ND=hidden_ND), []
    gap_N = (given.teacher_logp_N - given.student_logp_N).abs()
    columns = [x.split(LENGTHS) for x in (given.student_entropy_N, gap_N, hidden_ND)]
    for parts in zip(*columns, strict=True):
        expected += by_loop(*(part.tolist() for part in parts), p, q)
    assert Dear(p=p, q=q).loss(given).selected_N.tolist() == expected


def test_of_equal_entropies_the_first_are_decisions_and_of_equal_scores_the_first_are_evidence():
    # 2, then 2 of 3
    assert selected(Dear(p=0.4, q=0.5), of([1.0] * 5, [2.0] * 5, [(1.0, 0.0)] * 5)) == [0, 1, 2, 3]


def test_a_response_of_one_token_is_a_decision_without_evidence():
    assert selected(Dear(), of([0.3, 0.2], [1, 1], [(1, 0), (0, 1)], lengths=[1, 1])) == [0, 1]


def test_a_response_that_is_all_decisions_has_no_evidence():
    assert selected(Dear(p=1.0), of(ENTROPY, GAP, HIDDEN)) == list(range(10))


def test_a_share_of_evidence_is_refused_where_all_are_decisions():
    with pytest.raises(ValueError, match=r"q = 0\.5: has no effect with p = 1"):
        Dear(p=1.0, q=0.5)


def test_a_hidden_state_of_zeros_is_no_evidence():
    given = of([2.0, 0.1, 0.1, 0.1], [0, 1, 1, 1], [(1, 0), (0, 0), (1, 1), (-1, 0)])
    assert selected(Dear(p=0.25, q=0.3), given) == [0, 2]


def test_evidence_may_stand_before_its_decision_but_not_in_another_trajectory():
    hidden = [(1, 0.1), (0, 1), (1, 0), (0, 1), (1, 0), (0.1, 1)]
    given = of([0.1, 0.1, 5, 5, 0.1, 0.1], [1] * 6, hidden, lengths=[3, 3])
    assert selected(Dear(p=0.3, q=0.5), given) == [0, 2, 3, 5]


def test_the_mean_is_over_the_selected_tokens_and_nothing_is_learned_from_others():
    given = with_statistics(Dear(), of(ENTROPY, GAP, HIDDEN))
    result = Dear().loss(given)
    assert given.statistics["selected"] == 4  # what the learner divides by
    assert [t for t in range(10) if result.loss_N[t] != 0] == [0, 1, 2, 9]
    assert result.weight_N.tolist() == [1.0] * 10
