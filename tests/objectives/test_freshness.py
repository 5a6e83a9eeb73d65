"""f-OPD's weight and anchor: published numbers, a plain loop, and what they compose with."""

from dataclasses import replace
from math import exp

import pytest
import torch
from batches import LENGTHS, STUDENT, TEACHER, batch, coefficients, ragged, with_candidates
from test_identities import OLD, of_actions
from test_identities import STUDENT as LOGITS

from async_opd.objectives import all_objectives
from async_opd.objectives.freshness import Freshness
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.modifiers import DriftGate, PrefixRatio
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner.step import shares

BEHAVIOUR = [-0.15, -1.00, -0.05, -2.50, -0.30, -0.05]
LAG = [2, 2, 2, 1, 1, 1]


def six(**more):
    return batch(STUDENT, TEACHER, behaviour=BEHAVIOUR, lag=LAG, **more)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), 0.366177),
        (dict(age="largest"), 0.305148),
        (dict(xi=0.05), 0.316177),
        (dict(alpha=0.0, xi=0.05), 0.35),  # the age alone
        (dict(xi=0.5), 0.0),
    ],
)
def test_the_weight_is_that_of_the_reference(settings, expected):
    result = Opd(freshness=Freshness(**settings)).loss(six())
    assert result.weight_N.tolist() == pytest.approx([expected] * 6, abs=1e-6)
    assert result.metrics["freshness"].tolist() == result.weight_N.tolist()
    assert result.metrics["moved"].tolist() == pytest.approx([0.007805] * 6, abs=1e-6)


def test_with_the_anchor_a_token_has_one_coefficient():
    objective = Opd(freshness=Freshness(xi=0.05, lam=0.1))
    expected = [-0.018281, 0.134609, -0.948532, -0.200813, 0.002861, 0.002281]
    assert coefficients(objective, six()) == pytest.approx(expected, abs=1e-6)
    log_rho = [s - b for s, b in zip(STUDENT, BEHAVIOUR, strict=True)]
    advantage = [t - s - 0.1 * r for s, t, r in zip(STUDENT, TEACHER, log_rho, strict=True)]
    assert objective.loss(six()).advantage.tolist() == pytest.approx(advantage)


def expected_gradient(objective, **columns):
    """Over the four actions of one prefix, each sampled under the old policy."""
    logits = LOGITS.clone().requires_grad_()
    given = replace(of_actions(logits), **columns)
    (OLD.softmax(0) * objective.loss(given).loss_N).sum().backward()
    return logits.grad


ANCHOR = torch.tensor([-0.193337, -0.078139, 0.315377, -0.043900]).double()


@pytest.mark.parametrize("correction", [Importance(), Ppo(clip=0.99)], ids=str)
def test_the_anchor_is_the_gradient_of_the_kl_to_the_policy_that_sampled(correction):
    """λ = 1 less λ = 0, at lag 0 and α = 0, where the weight is 1."""
    gradients = [
        expected_gradient(Opd(correction=correction, freshness=Freshness(alpha=0.0, lam=lam)))
        for lam in (0.0, 1.0)
    ]
    if isinstance(correction, Importance):
        torch.testing.assert_close(gradients[1] - gradients[0], ANCHOR, atol=1e-6, rtol=0)
    else:  # it changes the sign of some advantages, so which of them are clipped
        assert (gradients[1] - gradients[0]).abs().max() > 0.1


def test_a_divergence_takes_the_anchor_as_a_second_part():
    def given(objective):
        logits = LOGITS.clone().requires_grad_()
        actions = of_actions(logits)
        every = torch.arange(4).expand(4, 4)
        teacher = actions.teacher_logp_N.expand(4, 4)
        given = with_candidates(actions, logits.log_softmax(0).expand(4, 4), teacher, every)
        (OLD.softmax(0) * objective.loss(given).loss_N).sum().backward()
        return logits.grad

    plain, anchored = (
        given(TopkKl(k=4, rest="drop", freshness=Freshness(alpha=0.0, lam=lam))) for lam in (0, 1)
    )
    torch.testing.assert_close(anchored - plain, ANCHOR, atol=1e-6, rtol=0)


def test_each_of_several_samples_has_its_own_anchor():
    given = replace(
        batch([-1.0], [-2.0], behaviour=[-1.0]),
        student_logp_NK=torch.tensor([[-1.0]]).double(),
        behaviour_logp_NK=torch.tensor([[-1.5]]).double(),
        teacher_logp_NK=torch.tensor([[-1.0]]).double(),
    )
    result = McOpd(m=2, freshness=Freshness(lam=0.2)).loss(given)
    assert result.advantage.tolist() == [pytest.approx([-1.0, -0.1])]


def test_against_a_plain_loop_and_masked_tokens_count():
    lag = [0, 3, 1, 2, 2, 5, 1, 1, 1, 1, 0, 0, 0, 4, 4, 2, 1, 0]
    given = replace(ragged(3), lag_N=torch.tensor(lag))
    found = Opd(freshness=Freshness(alpha=2.0, xi=0.02, lam=0.0)).loss(given).weight_N.tolist()
    expected, start = [], 0
    for length in LENGTHS:
        tokens = range(start, start + length)
        logs = [(given.student_logp_N[n] - given.behaviour_logp_N[n]).item() for n in tokens]
        drift = sum(exp(x) * x - exp(x) + 1 for x in logs) / length
        age = sum(lag[n] for n in tokens) / length
        expected += [max(0.0, exp(-2 * drift**0.5) / (age + 1) - 0.02)] * length
        start += length
    assert found == pytest.approx(expected)


def test_responses_of_weight_zero_stay_in_the_mean():
    """Two responses, of which the older is cut off: the other's loss is halved all the same."""
    objective = Opd(freshness=Freshness(alpha=0.0, xi=0.4, lam=0.0), mean_over="sequences")
    given = batch([-1.0] * 3, [-2.0] * 3, lengths=[2, 1], lag=[0, 0, 9])
    result = objective.loss(given)
    assert result.weight_N.tolist() == pytest.approx([0.6, 0.6, 0.0])
    assert result.selected_N.all()
    kept = type("Micro", (), {})()
    kept.keep_N, kept.segment_N, kept.reward_S = result.selected_N, given.segment_N, given.reward_S
    statistics = objective.statistics(given, result.selected_N)
    assert statistics["sequences"] == 2
    assert shares(objective, kept, statistics).tolist() == pytest.approx([0.25, 0.25, 0.5])


def test_the_bounds_hold_for_the_anchor_too():
    given = batch([-1.0], [-1.5], behaviour=[-4.0])  # log ρ = 3, A = -.5
    bounded = Opd(freshness=Freshness(alpha=0.0, lam=1.0), signal_at_most=2.0, weight_at_most=4.0)
    result = bounded.loss(given)
    assert result.advantage.tolist() == [-2.0]
    assert coefficients(bounded, given) == pytest.approx([-8.0])
    free = Opd(freshness=Freshness(alpha=0.0, lam=1.0))
    assert coefficients(free, given) == pytest.approx([-3.5 * exp(3)])


def test_ratios_beyond_all_bounds_give_no_weight_and_no_nan():
    given = batch([-1.0, -50.0], [-1.0, -1.0], behaviour=[-90.0, -1.0], lengths=[1, 1])
    result = Opd(freshness=Freshness()).loss(given)
    assert result.weight_N.isfinite().all() and result.loss_N.isfinite().all()
    assert result.weight_N[0] == 0 and 0 < result.weight_N[1] < exp(-0.9)


PREFIX = Importance(ratio="prefix")
NORMALISED = Importance(ratio="prefix_normalised")


@pytest.mark.parametrize(
    ("tag", "settings", "both"),
    [
        ("opd", dict(freshness=Freshness(), drift_gate=DriftGate()), ("freshness", "drift_gate")),
        ("opd", dict(freshness=Freshness(), correction=PREFIX), ("freshness", "correction.ratio")),
        (
            "mc_opd",
            dict(drift_gate=DriftGate(), correction=NORMALISED),
            ("drift_gate", "correction.ratio"),
        ),
        (
            "topk_kl",
            dict(k=2, freshness=Freshness(), prefix=PrefixRatio()),
            ("freshness", "prefix"),
        ),
        ("eopd", dict(drift_gate=DriftGate(), prefix=PrefixRatio()), ("drift_gate", "prefix")),
    ],
)
def test_what_corrects_the_state_twice_is_refused_by_name(tag, settings, both):
    with pytest.raises(ValueError) as refused:
        all_objectives()[tag](**settings)
    assert str(refused.value) == (
        f"{both[0]}: must not stand beside {both[1]}, for both correct how far the student has"
        " moved from what it wrote"
    )


@pytest.mark.parametrize(
    ("tag", "settings"),
    [
        ("opd", dict(freshness=Freshness(), correction=Ppo())),
        ("opd", dict(freshness=Freshness(), correction=Importance(ratio="geometric"))),
        # of its two parts each has its own
        ("eopd", dict(correction=PREFIX, prefix=PrefixRatio())),
    ],
)
def test_what_corrects_it_once_is_not(tag, settings):
    assert all_objectives()[tag](**settings)


def test_the_kl_of_the_four_actions_is_the_mean_of_what_has_moved():
    result = Opd(freshness=Freshness()).loss(of_actions(LOGITS.clone().requires_grad_()))
    moved = (OLD.softmax(0) * result.metrics["moved"]).sum().item()
    assert moved == pytest.approx(0.182974, abs=1e-6)
    assert exp(-(moved**0.5)) / 3 == pytest.approx(0.217324, abs=1e-6)
