from dataclasses import replace
from statistics import mean, pstdev

import pytest
import torch
from batches import (
    KEPT,
    LENGTHS,
    NAN,
    REFERENCE,
    STUDENT,
    TEACHER,
    batch,
    ragged,
    rows,
    with_statistics,
)

from async_opd.objectives.sg_opd import SgOpd


def one_of_two(reward, **more):
    """The six tokens as the right or wrong one of a group of two."""
    return batch(
        STUDENT, TEACHER, reference_logp_N=REFERENCE, reward=[reward], group=[[1.0, 0.0]], **more
    )


def result(objective, given, kept=None):
    return objective.loss(with_statistics(objective, given, kept))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(1.0, [-0.05, 0.82, -3.0, -0.5, 0.0, 0.018]), (0.0, [-0.074, 0.5, -5.2, -1.06, 0.0, 0.01])],
)
def test_the_advantage_extrapolates_where_the_signs_agree_by_the_published_numbers(
    reward, expected
):
    assert result(SgOpd(), one_of_two(reward)).advantage.tolist() == pytest.approx(expected)


def test_phi_is_the_published_one_of_mean_one():
    weight_N = result(SgOpd(), one_of_two(1.0)).weight_N
    assert weight_N.tolist() == pytest.approx([1.125, 1.125, 0.375, 1.125, 1.125, 1.125])


@pytest.mark.parametrize(
    ("settings", "conflict"),
    [
        (dict(beta=0.3), lambda a1, a2, away: 0.3 * a2),
        (dict(beta=0.0), lambda a1, a2, away: 0.0),
        (dict(fallback="preserve", lambda_base=1.25), lambda a1, a2, away: a2 + 0.25 * away),
        (dict(fallback="grpo"), lambda a1, a2, away: a1),
    ],
    ids=["beta 0.3", "beta 0", "preserve", "grpo"],
)
def test_advantage_and_weight_are_those_of_a_loop_by_each_fallback(settings, conflict):
    given, advantage, phi = ragged(5), [], []
    names = ("student_logp_N", "teacher_logp_N", "reference_logp_N")
    for s, tokens in enumerate(rows(given, *names)):
        reward, known = (
            given.reward_S[s].item(),
            [r for r in given.group_reward_SG[s].tolist() if r == r],
        )
        a1 = (reward - mean(known)) / (pstdev(known) + 1e-6) if reward == reward else 0.0
        for student, teacher, reference in tokens:
            a2, away = teacher - student, teacher - reference
            advantage.append(a2 + 0.8 * away if a1 * a2 > 0 else conflict(a1, a2, away))
            phi.append(min(1.0, 0.7 / abs(a2)))
    unit = sum(f for f, kept in zip(phi, KEPT, strict=True) if kept) / sum(KEPT)
    got = result(SgOpd(tau=0.7, **settings), given, KEPT)
    assert got.advantage.tolist() == pytest.approx(advantage)
    assert got.weight_N.tolist() == pytest.approx([f / unit for f in phi])


@pytest.mark.parametrize(
    ("reward", "group"),
    [
        (NAN, [NAN, 1, 0]),
        (1.0, [1, 1, 1]),
        (0.0, [0, 0, NAN]),
        (1.0, [1.0, NAN, NAN]),
        (0.1, [0.1, 0.1, 0.1]),
    ],
    ids=str,
)
def test_without_a_known_contrast_every_token_falls_back(reward, group):
    given = batch(STUDENT, TEACHER, reference_logp_N=REFERENCE, reward=[reward], group=[group])
    got = result(SgOpd(beta=0.5), given)
    assert got.advantage.tolist() == pytest.approx([-0.025, 0.25, -1.5, -0.25, 0.0, 0.005])
    assert got.metrics["no_sign"].all()
    assert result(SgOpd(fallback="grpo"), given).advantage.tolist() == [0.0] * 6


@pytest.mark.parametrize("reward", [0.3, 0.75])
def test_the_sign_of_a_share_is_whether_it_is_above_its_groups_mean(reward):
    group = [0.3, 0.3, 0.3, 0.3, 0.75, NAN]  # mean .39, deviation .18
    given = batch(STUDENT, TEACHER, reference_logp_N=REFERENCE, reward=[reward], group=[group])
    got = result(SgOpd(fallback="grpo"), given)
    a1 = (reward - 0.39) / 0.18
    gap, away = [-0.05, 0.5, -3.0, -0.5, 0.0, 0.01], [-0.03, 0.4, -2.75, -0.7, 0.1, 0.01]
    expected = [a2 + 0.8 * t if a1 * a2 > 0 else a1 for a2, t in zip(gap, away, strict=True)]
    assert got.advantage.tolist() == pytest.approx(expected, abs=1e-4)


def test_unknown_verdicts_are_left_out_of_their_group():
    known = [[1.0, 0.0, 0.0, NAN, NAN]]  # mean 1/3, deviation √2/3
    given = batch([-1.0], [-2.0], reference_logp_N=[-1.0], reward=[1.0], group=known)
    assert result(SgOpd(fallback="grpo"), given).advantage.item() == pytest.approx(2**0.5, abs=1e-5)


def test_tokens_are_shown_to_agree_to_disagree_or_to_have_no_sign():
    shown = result(SgOpd(), one_of_two(1.0)).metrics  # A = -.05, .5, -3, -.5, 0, .01
    assert {name: [int(x) for x in value] for name, value in shown.items()} == {
        "agree": [0, 1, 0, 0, 0, 1],
        "disagree": [1, 0, 1, 1, 0, 0],
        "no_sign": [0, 0, 0, 0, 1, 0],
    }


def test_cached_signals_gate_and_scale_by_the_behaviour_policy():
    given = batch(
        [-1.0, -1.0],
        [-2.0, -2.0],
        behaviour=[-3.0, -6.0],
        reference_logp_N=[-2.5, -2.0],
        reward=[1.0],
        group=[[1, 0]],
    )
    got = result(SgOpd(student_signal="cached"), given)
    # both agree: -2 + 3, -2 + 6
    assert got.advantage.tolist() == pytest.approx([1.0 + 0.8 * 0.5, 4.0])
    assert got.weight_N.tolist() == pytest.approx([1.6, 0.4])  # 1 and 1/4 over 5/8
    assert not SgOpd(student_signal="cached").needs().first_pass and SgOpd().needs().first_pass


def test_a_step_without_a_kept_token_gives_zeros_and_not_nan():
    given = ragged(0)
    loss_N = result(SgOpd(), given, [False] * sum(LENGTHS)).loss_N
    (gradient_N,) = torch.autograd.grad(loss_N[:0].sum() + 0 * loss_N.sum(), given.student_logp_N)
    assert gradient_N.tolist() == [0.0] * sum(LENGTHS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(fallback="grpo", beta=0.5), r"beta = 0\.5: has no effect with fallback = 'grpo'"),
        (
            dict(fallback="preserve", beta=0.5),
            r"beta = 0\.5: has no effect with fallback = 'preserve'",
        ),
        (dict(lambda_base=1.25), r"lambda_base = 1\.25: has no effect with fallback = 'interp'"),
    ],
)
def test_settings_of_another_fallback_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        SgOpd(**settings)


def test_no_reference_is_read_where_nothing_is_extrapolated():
    assert (
        SgOpd().needs().reference
        and SgOpd(lambda_high=1.0, fallback="preserve", lambda_base=1.25).needs().reference
    )
    objective = SgOpd(lambda_high=1.0)
    assert not objective.needs().reference
    given = replace(one_of_two(1.0), reference_logp_N=None)
    assert result(objective, given).advantage.tolist() == pytest.approx(
        [-0.05, 0.5, -3.0, -0.5, 0.0, 0.01]
    )
