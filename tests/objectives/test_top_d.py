"""TOP-D: published numbers, groups against a plain loop, and which gradient it has."""

from dataclasses import replace
from math import log
from statistics import fmean, pstdev

import pytest
import torch
from batches import KEPT, LENGTHS, STUDENT, TEACHER, batch, ragged, with_statistics
from test_identities import OLD, of_actions
from test_identities import STUDENT as LOGITS
from test_identities import TEACHER as TEACHER_LOGITS

from async_opd.core.wire import Needs
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo
from async_opd.objectives.top_d import TopD


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.2, [-0.009802, 0.121991, -0.210774, -0.081963, 0, 0.002008]),
        (0.1, [-0.004889, 0.062855, -0.099844, -0.040142, 0, 0.001005]),
        (1.0, [-0.05, 0.5, -3.0, -0.5, 0.0, 0.01]),
    ],
)
def test_the_bound_alone(alpha, expected):
    result = TopD(alpha=alpha).loss(batch(STUDENT, TEACHER))
    assert result.advantage.tolist() == pytest.approx(expected, abs=1e-6)
    assert TopD(alpha=alpha).requirements() == Needs()


def test_it_is_bounded_below_and_tells_where():
    teacher = [*TEACHER[:2], -3000.0, *TEACHER[3:]]
    result = TopD(alpha=0.2).loss(batch(STUDENT, teacher))
    assert result.advantage.min().item() == pytest.approx(log(0.8))
    # -.2108 of a nat is within a tenth of -.2231
    assert TopD().loss(batch(STUDENT, TEACHER)).metrics["floored"].tolist() == [0, 0, 1, 0, 0, 0]
    assert not TopD(alpha=1.0).loss(batch(STUDENT, teacher)).metrics["floored"].any()


FUTURE = [-0.054193, -0.088782, -0.210774, -0.080959, 0.002008, 0.002008]
NORMALISED = [0.245129, -0.236928, -1.937077, -0.127895, 1.028385, 1.028385]


def test_the_later_tokens_and_the_moments_of_the_group():
    given = batch(STUDENT, TEACHER, lengths=[3, 3])
    assert TopD(future=True).loss(given).advantage.tolist() == pytest.approx(FUTURE, abs=1e-6)
    objective = TopD(future=True, normalise=True)
    found = objective.loss(with_statistics(objective, given)).advantage.tolist()
    assert found == pytest.approx(NORMALISED, rel=2e-5)  # the floor of σ


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize("signal", ["live", "cached"])
def test_groups_by_a_plain_loop_where_some_tokens_have_left_the_loss(future, signal):
    numbers = [0, 1, 0, 1, 2]
    given = ragged(5, number=numbers)
    objective = TopD(alpha=0.3, future=future, normalise=True, student_signal=signal)
    found = objective.loss(with_statistics(objective, given, KEPT)).advantage.tolist()
    own = given.behaviour_logp_N if signal == "cached" else given.student_logp_N
    gaps = (given.teacher_logp_N - own).tolist()
    rewards, groups, start = [], [], 0
    for number, length in zip(numbers, LENGTHS, strict=True):
        r = [log(0.3 * 2.718281828459045**a + 0.7) for a in gaps[start : start + length]]
        later = [fmean(r[k + 1 :]) if future and r[k + 1 :] else 0.0 for k in range(length)]
        rewards += [x + y for x, y in zip(r, later, strict=True)]
        groups += [number] * length
        start += length
    for x, group, y in zip(rewards, groups, found, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        assert y == pytest.approx((x - fmean(mine)) / (pstdev(mine) + 1e-6), abs=1e-9)
    assert objective.needs().groups and objective.needs().first_pass == (signal == "live")


def expected_gradient(objective):
    logits = LOGITS.clone().requires_grad_()
    (OLD.softmax(0) * objective.loss(of_actions(logits)).loss_N).sum().backward()
    return logits.grad


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("live", [-0.034964, 0.001223, 0.057714, -0.023973]),
        ("cached", [-0.005816, 0.006902, 0.013899, -0.014985]),
    ],
)
def test_with_the_live_signal_it_is_the_kl_to_the_mixture(signal, expected):
    found = expected_gradient(TopD(student_signal=signal))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    if signal == "live":
        logits = LOGITS.clone().requires_grad_()
        p, q = logits.softmax(0), TEACHER_LOGITS.softmax(0)
        mixture = (0.2 * q + 0.8 * p).detach()
        (p * (p / mixture).log()).sum().backward()
        torch.testing.assert_close(found, logits.grad, atol=1e-9, rtol=0)


def test_of_a_vanishing_share_it_is_forward_kl():
    found = expected_gradient(TopD(alpha=1e-6)) / 1e-6
    assert found.tolist() == pytest.approx([-0.167582, 0.015323, 0.284582, -0.132322], abs=1e-5)


@pytest.mark.parametrize("correction", [Importance(), Ppo()], ids=str)
def test_without_a_mixture_it_is_opd(correction):
    given = ragged(4)
    torch.testing.assert_close(
        TopD(alpha=1.0, correction=correction).loss(given).loss_N,
        Opd(correction=correction).loss(given).loss_N,
    )


def test_a_group_whose_tokens_are_all_alike_says_nothing():
    given = batch([-1.0] * 4, [-2.0] * 4, lengths=[2, 2])
    objective = TopD(normalise=True)
    result = objective.loss(with_statistics(objective, replace(given)))
    assert result.advantage.abs().max() < 1e-6
