"""A task reward beside distillation: its numbers by hand, and what becomes of unknown verdicts."""

from dataclasses import replace

import msgspec
import pytest
import torch
from batches import NAN, STUDENT, TEACHER, batch, coefficients, with_statistics

from async_opd.core.wire import Needs
from async_opd.maths.advantages import Moments
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.opd import Opd
from async_opd.objectives.reward import Reward
from async_opd.objectives.sampled import Importance

DISTILLATION = [-0.05, 0.5, -3.0, -0.5, 0.0, 0.01]  # log π_T - log π
# two responses of 4 and 2 tokens; a third sample of either prompt, of 10 and 8
PAST = {"task_reward": Moments(5.0, 0.4, 1.0)}


def two(first, second, **more):
    """A right and a wrong response, each with the rewards of its group."""
    return batch(
        STUDENT,
        TEACHER,
        lengths=[4, 2],
        reward=[first[0], second[0]],
        group=[first, second],
        group_lengths=[[4, 10], [2, 8]],
        cap=10.0,
        running=PAST,
        **more,
    )


@pytest.mark.parametrize(
    ("reward", "first", "second"),
    [
        (Reward(), 0.5, -0.5),
        (Reward(weight=2.0), 1.0, -1.0),
        (Reward(baseline="none"), 1.0, 0.0),
        (Reward(baseline="running"), 0.6, -0.4),
        # r = 1 - 0.5·0.4 = 0.8 and 0 - 0.5·1 = -0.5, mean 0.15; 0 - 0.5·0.2 = -0.1 and 0.6, 0.25
        (Reward(length_penalty=0.5), 0.65, -0.35),
        (Reward(baseline="none", length_penalty=0.5), 0.8, -0.1),
        (Reward(weight=3.0, baseline="running", length_penalty=0.5), 1.2, -1.5),
    ],
)
def test_it_is_added_to_the_advantage_of_each_token(reward, first, second):
    objective = Opd(reward=reward)
    given = with_statistics(objective, two([1.0, 0.0], [0.0, 1.0]))
    parts = [first] * 4 + [second] * 2
    expected = [a + part for a, part in zip(DISTILLATION, parts, strict=True)]
    assert objective.loss(given).advantage.tolist() == pytest.approx(expected, abs=1e-12)
    assert coefficients(objective, given) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("baseline", ["group", "running", "none"])
def test_an_unknown_verdict_adds_nothing_and_is_in_no_baseline(baseline):
    objective = Opd(reward=Reward(baseline=baseline, length_penalty=0.5))
    given = with_statistics(objective, two([NAN, 1.0], [1.0, NAN]))
    advantage = objective.loss(given).advantage.tolist()
    assert advantage[:4] == pytest.approx(DISTILLATION[:4], abs=1e-12)
    # r = 1 - 0.5·0.2 = 0.9, alone in its group
    second = {"group": 0.0, "running": 0.5, "none": 0.9}[baseline]
    expected = [a + second for a in DISTILLATION[4:]]
    assert advantage[4:] == pytest.approx(expected, abs=1e-12)


def test_running_moments_are_those_of_known_rewards_before_their_baseline():
    objective = Opd(reward=Reward(weight=7.0, baseline="running", length_penalty=0.5))
    moments = objective.moments(two([1.0, 0.0], [NAN, 1.0]))
    assert moments["task_reward"][0].item() == pytest.approx(0.8)
    assert moments["task_reward"][1].isnan()
    assert objective.needs().running == ("task_reward",)


def test_before_the_first_step_there_is_no_baseline_yet():
    objective = Opd(reward=Reward(baseline="running"))
    given = replace(two([1.0, 0.0], [0.0, 1.0]), running={"task_reward": Moments()})
    expected = [a + part for a, part in zip(DISTILLATION, [1.0] * 4 + [0.0] * 2, strict=True)]
    advantage_N = objective.loss(with_statistics(objective, given)).advantage
    assert advantage_N.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_shares_of_both_parts_are_measured():
    objective = Opd(reward=Reward())
    given = with_statistics(objective, two([1.0, 0.0], [NAN, 1.0]))
    metrics = objective.loss(given).metrics
    assert metrics["reward_share"].tolist() == pytest.approx(
        [0.5 / 0.55, 0.5 / 1.0, 0.5 / 3.5, 0.5 / 1.0, 0.0, 0.0]
    )
    assert metrics["distillation_share"].tolist() == pytest.approx(
        [0.05 / 0.55, 0.5, 3.0 / 3.5, 0.5, 0.0, 1.0]
    )


def test_staleness_is_corrected_for_the_sum_and_bounds_hold_for_it():
    behaviour = [logp - 0.5 for logp in STUDENT]
    given = two([1.0, 0.0], [0.0, 1.0], behaviour=behaviour)
    objective = Opd(reward=Reward(), correction=Importance(at_most=1.5), signal_at_most=0.4)
    # 0.45, 1.0, -2.5, 0.0, -0.5, -0.49 within ±0.4; e^0.5 within 1.5
    expected = [0.4 * 1.5, 0.4 * 1.5, -0.4 * 1.5, 0.0, -0.4 * 1.5, -0.4 * 1.5]
    assert coefficients(objective, with_statistics(objective, given)) == pytest.approx(expected)


def test_of_several_samples_a_position_the_generated_one_alone_has_it_undivided():
    m, objective = 3, McOpd(m=3, reward=Reward())
    given = two([1.0, 0.0], [0.0, 1.0])
    beside = dict(
        student_logp_NK=torch.full((6, 2), -1.0).double().requires_grad_(),
        behaviour_logp_NK=torch.full((6, 2), -1.0).double(),
        teacher_logp_NK=torch.full((6, 2), -0.7).double(),
    )
    given = replace(given, **beside)
    parts = [0.5] * 4 + [-0.5] * 2
    sampled, more = torch.autograd.grad(
        -objective.loss(given).loss_N.sum(), [given.student_logp_N, given.student_logp_NK]
    )
    expected = [a / m + part for a, part in zip(DISTILLATION, parts, strict=True)]
    assert sampled.tolist() == pytest.approx(expected)
    assert more.flatten().tolist() == pytest.approx([0.3 / m] * 12)


@pytest.mark.parametrize(("m", "most"), [(1, 0.4), (16, 0.4), (16, 5.0)])
def test_a_bound_leaves_of_the_reward_what_it_leaves_without_more_samples(m, most):
    """The mean of others of the same signal changes nothing, so ℓ is that of `opd`."""
    given = two([1.0, 0.0], [0.0, 1.0])
    beside = {
        f"{who}_logp_NK": getattr(given, f"{who}_logp_N").detach()[:, None].expand(6, m - 1)
        for who in ("student", "behaviour", "teacher")
    }
    bounds = dict(reward=Reward(weight=0.8), signal_at_most=most)
    opd, several = (
        o.loss(with_statistics(o, replace(given, **more)))
        for o, more in ((Opd(**bounds), {}), (McOpd(m=m, **bounds), beside if m > 1 else {}))
    )
    torch.testing.assert_close(several.loss_N, opd.loss_N)


def test_the_gradient_is_that_of_distillation_plus_the_policy_gradient_of_the_reward():
    """Exactly: over all responses of two tokens of a policy with 3 logits, the expected gradient
    on stale samples is that of E[weight · r] - KL at frozen prefixes."""
    random = torch.Generator().manual_seed(0)
    live, old, teacher = torch.randn(3, 3, generator=random).double()
    live.requires_grad_()
    rewards = torch.tensor([1.0, 0.0, 0.3]).double()
    objective = Opd(reward=Reward(weight=0.7, baseline="none"))
    logp, q = live.log_softmax(0), teacher.log_softmax(0)
    exact = (logp.exp() * (0.7 * rewards - (logp - q))).sum()
    (expected,) = torch.autograd.grad(exact, live)
    behaviour = old.log_softmax(0)
    given = replace(
        batch(
            [0.0] * 3,
            q.tolist(),
            behaviour=behaviour.tolist(),
            lengths=[1, 1, 1],
            reward=rewards.tolist(),
        ),
        student_logp_N=live.log_softmax(0),
    )
    loss_N = objective.loss(with_statistics(objective, given)).loss_N
    (got,) = torch.autograd.grad((behaviour.exp() * loss_N).sum(), live)
    torch.testing.assert_close(-got, expected)


def test_what_it_needs():
    assert Opd(reward=Reward()).needs() == Needs(groups=True)
    assert Opd(reward=Reward(baseline="none")).needs() == Opd().needs() == Needs()


@pytest.mark.parametrize(
    "settings", [{"weight": 0.0}, {"baseline": "critic"}, {"length_penalty": -1.0}, {"scale": 1.0}]
)
def test_what_it_does_not_take(settings):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"tag": "opd", "reward": settings}, Opd)
