"""RG-OPD's gate: published numbers, unknown verdicts, the divisor, what it shows."""

from dataclasses import replace
from math import isnan

import pytest
import torch
from batches import NAN, batch, with_statistics
from test_renio import LENGTHS, three

from async_opd.objectives.rg_opd import RgOpd
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner.step import shares


def responses(advantages, **more):
    """The three responses of the reference, Σ A -3.04, -6.7, -0.5, with rewards whose place among
    their group's is of these signs."""
    rewards = {1: 1.0, -1: 0.0, 0: 1.0, None: NAN}
    groups = {1: [1.0, 0.0], -1: [0.0, 1.0], 0: [1.0, 1.0], None: [NAN, 1.0]}
    tail = torch.full((14,), 0.5).double().log()
    return replace(
        three(reward=[rewards[a] for a in advantages], group=[groups[a] for a in advantages]),
        student_logp_NK=torch.full((14, 1), 0.5).double().log(),
        teacher_logp_NK=torch.full((14, 1), 0.25).double().log(),
        student_tail_logp_N=tail,
        teacher_tail_logp_N=torch.full((14,), 0.75).double().log(),
        **more,
    )


@pytest.mark.parametrize(
    ("advantages", "kept", "divisor"),
    [
        ((1, -1, 0), (0, 1, 1), 8),
        ((-1, 1, 1), (1, 0, 0), 6),
        ((-1, -1, None), (1, 1, 0), 10),
        ((1, 1, None), (0, 0, 0), 0),
    ],
)
def test_which_responses_are_kept_and_the_mean_is_over_their_tokens(advantages, kept, divisor):
    objective = RgOpd(k=1)
    given = with_statistics(objective, responses(advantages))
    result = objective.loss(given)
    each = [bool(g) for g, n in zip(kept, LENGTHS, strict=True) for _ in range(n)]
    assert result.selected_N.tolist() == each
    assert given.statistics["selected"] == divisor
    plain = TopkKl(k=1, support="student").loss(given).loss_N
    assert result.loss_N.tolist() == pytest.approx((plain * torch.tensor(each)).tolist())
    micro = replace(given)
    object.__setattr__(micro, "keep_N", torch.ones(14).bool())
    total = (result.loss_N * shares(objective, micro, given.statistics)).sum().item()
    assert total == pytest.approx(plain[0].item() if divisor else 0.0)


def test_the_margin_is_of_the_sum():
    given = responses((-1, -1, -1))
    assert RgOpd(k=1, margin=1.0).selection(given).tolist() == [True] * 10 + [False] * 4
    assert (
        RgOpd(k=1, margin=4.0).selection(given).tolist() == [False] * 6 + [True] * 4 + [False] * 4
    )
    # clipped: .55 - .5 + .5 … of each token first
    bounded = RgOpd(k=1, margin=2.2, signal_at_most=0.5)
    assert bounded.selection(given).tolist() == [False] * 14


def test_a_right_response_is_kept_where_the_teacher_likes_it():
    given = batch([-1.0, -2.0], [-0.5, -2.2], reward=[1.0], group=[[1.0, 0.0]])
    assert RgOpd(k=1).selection(given).all()
    assert not RgOpd(k=1, margin=0.31).selection(given).any()


def test_what_is_kept_is_shown_by_verdict():
    objective = RgOpd(k=1)
    metrics = objective.loss(with_statistics(objective, responses((1, -1, None)))).metrics
    right, wrong = metrics["kept_right"].tolist(), metrics["kept_wrong"].tolist()
    assert right[:6] == [0.0] * 6 and all(isnan(x) for x in right[6:])
    assert wrong[6:10] == [1.0] * 4 and all(isnan(x) for x in wrong[:6] + wrong[10:])


def test_it_asks_for_the_students_fifty_likeliest_and_for_groups():
    needs = RgOpd().needs()
    assert (needs.teacher_at_student_ids, needs.tail, needs.groups) == (50, True, True)
    assert needs.sums == ("selected",) and needs.first_pass
