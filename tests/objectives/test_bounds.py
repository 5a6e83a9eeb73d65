"""Bounds on a token's signal and on its weight, against numbers by hand and NumPy. That they hold
for every objective stands in test_contract."""

from dataclasses import replace
from math import e, exp, log

import numpy as np
import pytest
import torch
from batches import STUDENT, TEACHER, batch, coefficients, with_statistics

from async_opd.maths.advantages import Moments
from async_opd.objectives.base import Objective
from async_opd.objectives.dear import Dear
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.eopd import Eopd
from async_opd.objectives.g_opd import GOpd
from async_opd.objectives.iw_opd import IwOpd
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.modifiers import DriftGate, RandomShare
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo
from async_opd.objectives.sg_opd import SgOpd
from async_opd.objectives.token_batch import TokenLoss, declared
from async_opd.objectives.topk_kl import TopkKl

FORBIDDEN = [TEACHER[0], TEACHER[1], -3000.0, *TEACHER[3:]]  # of the third token
GAP = [-0.05, 0.5, -2999.95, -0.5, 0.0, 0.01]
CLIPPED = [-0.05, 0.4, -0.4, -0.4, 0.0, 0.01]


def forbidding(objective=None, **more):
    given = batch(STUDENT, FORBIDDEN, **more)
    return with_statistics(objective, given) if objective else given


def test_the_advantage_is_clipped_before_the_correction():
    objective = Opd(signal_at_most=0.4)
    given = forbidding(behaviour=[x - log(2) for x in STUDENT])
    result = objective.loss(given)
    assert result.advantage.tolist() == pytest.approx(CLIPPED)
    assert result.ratio.tolist() == pytest.approx([2.0] * 6)
    assert result.metrics["signal_bounded"].tolist() == [False, True, True, True, False, False]
    assert result.loss_N.tolist() == pytest.approx(
        [-2 * a * logp for a, logp in zip(CLIPPED, STUDENT, strict=True)]
    )
    assert coefficients(objective, given) == pytest.approx([2 * a for a in CLIPPED])
    assert coefficients(Opd(), given) == pytest.approx([2 * a for a in GAP])


def test_extrapolation_and_gate_come_before_the_bound():
    # A(1.25) = gap + .25 (log π_T - log π_ref): .5 + .25 (-.7 + 1.1) = .6
    given = forbidding(reference_logp_N=[-0.12, -1.10, -0.30, -2.10, -0.50, -0.02])
    found = GOpd(signal_at_most=0.55).loss(given).advantage.tolist()
    assert found == pytest.approx([-0.0575, 0.55, -0.55, -0.55, 0.025, 0.0125])


def test_a_reward_that_few_past_ones_make_large_is_bounded_as_well():
    moments = {"reward": Moments(1000.0, 0.001, 0.999)}  # one right answer in a thousand
    given = replace(batch(STUDENT, TEACHER, reward=[1.0]), running=moments, step=20)
    plain = Egrsd(gamma=0.0, length_bonus=0.0)
    bounded = Egrsd(gamma=0.0, length_bonus=0.0, signal_at_most=3.0)
    assert plain.loss(given).advantage.tolist() == pytest.approx([31.607] * 6, rel=1e-3)
    assert bounded.loss(given).advantage.tolist() == [3.0] * 6
    assert torch.equal(bounded.loss(given).weight_N, plain.loss(given).weight_N)


def test_weights_and_selections_take_the_bounded_size():
    sizes = np.abs(CLIPPED)
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    expected = 1 + 0.5 * (1 - before / (sizes.sum() + 1e-8))
    assert IwOpd(signal_at_most=0.4).weight(forbidding()).tolist() == pytest.approx(expected)
    objective = SgOpd(signal_at_most=4.0, lambda_high=1.0)  # φ 1/4 where it was 1/3000
    given = forbidding(objective, reward=[1.0], group=[[1, 0]])
    mean = (5 + 1 / 4) / 6
    assert objective.loss(given).weight_N.tolist() == pytest.approx(
        [phi / mean for phi in (1, 1, 1 / 4, 1, 1, 1)]
    )
    # a decision, then cosines to it of 1, .95, .9, 0 and gaps of 0, 0, 2, 3000 nats, one of them
    # evidence: by â (1 + d̂) the first, as 2 of 3000 are nothing, or the third, 1.8 against 1
    given = batch(
        [-1.0] * 5,
        [-1.0, -1.0, -1.0, -3.0, -3001.0],
        student_entropy_N=[1.0, 0.0, 0.0, 0.0, 0.0],
        hidden_ND=[[1.0, 0.0], *([x, (1 - x * x) ** 0.5] for x in (1.0, 0.95, 0.9, 0.0))],
    )
    chosen = [Dear(p=0.2, q=0.25, signal_at_most=c).selection(given) for c in (None, 2.0)]
    assert [x.nonzero()[:, 0].tolist() for x in chosen] == [[0, 1], [0, 3]]


def test_a_ppo_clip_reads_the_sign_alone_so_it_composes():
    given = forbidding(behaviour=[x + log(2) for x in STUDENT])  # ρ = 1/2
    objective = Opd(correction=Ppo(clip=0.2), signal_at_most=0.4)
    # f = .8 and no gradient where A < 0, ρ where A ≥ 0
    assert objective.loss(given).loss_N.tolist() == pytest.approx(
        [0.04, -0.2, 0.32, 0.32, 0, -5e-3]
    )
    assert coefficients(objective, given) == pytest.approx([0, 0.2, 0, 0, 0, 0.005])


def test_each_of_several_samples_is_clipped_by_itself():
    given = replace(
        batch([-1.0], [-2.0]),
        student_logp_NK=torch.tensor([[-1.0, -2.0]]).double().requires_grad_(),
        behaviour_logp_NK=torch.tensor([[-1.0, -2.0 - log(4)]]).double(),
        teacher_logp_NK=torch.tensor([[-3000.0, -1.5]]).double(),
    )
    result = McOpd(m=3, signal_at_most=0.75).loss(given)
    assert result.advantage.tolist() == [pytest.approx([-0.75, -0.75, 0.5])]
    result.loss_N.sum().backward()
    assert given.student_logp_NK.grad.tolist() == [pytest.approx([0.25, -4 * 0.5 / 3])]
    # the largest ratio, 4, is lowered to 2, and the position with it
    result = McOpd(m=3, signal_at_most=0.75, weight_at_most=2.0).loss(given)
    assert result.weight_N.tolist() == pytest.approx([0.5])
    assert result.metrics["weight_bounded"].tolist() == [True]


LOGITS = [[0.3, -1.0, 2.0, 0.5], [5.0, -4.0, 0.0, 1.0]]
FORBIDS = [[0.1, 1.0, -3000.0, 0.4], [-3000.0, 2.0, 0.0, -0.5]]


def dense(k, **settings):
    """Value, gradient in the student's logits, and metrics of a divergence over k of four ids."""
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    student, teacher = (
        logits.log_softmax(1),
        torch.tensor(FORBIDS, dtype=torch.float64).log_softmax(1),
    )
    tail = k < 4 and settings.get("rest", "bucket") == "bucket"
    given = replace(
        batch([-1.0, -1.0], [-1.0, -1.0]),
        student_logp_NK=student[:, :k],
        teacher_logp_NK=teacher[:, :k],
        student_tail_logp_N=student[:, k:].logsumexp(1) if tail else None,
        teacher_tail_logp_N=teacher[:, k:].logsumexp(1) if tail else None,
    )
    result = TopkKl(k=k, **settings).loss(given)
    result.loss_N.sum().backward()
    return result.loss_N.detach().numpy(), logits.grad.numpy(), result.metrics


def outcomes_np(k, rest):
    """Log-probs of student and teacher of the outcomes, and the matrix that sums ids to them."""
    student, teacher = (
        np.array(x) - np.log(np.exp(np.array(x)).sum(1, keepdims=True)) for x in (LOGITS, FORBIDS)
    )
    if k == 4:
        return student, teacher, np.eye(4)
    if rest == "renormalise":
        cut = [
            x[:, :k] - np.log(np.exp(x[:, :k]).sum(1, keepdims=True)) for x in (student, teacher)
        ]
        return *cut, None
    if rest == "drop":
        return student[:, :k], teacher[:, :k], np.eye(k, 4)
    joined = np.vstack([np.eye(k, 4), np.r_[np.zeros(k), np.ones(4 - k)]])
    with np.errstate(divide="ignore"):
        return *(np.log(np.exp(x) @ joined.T) for x in (student, teacher)), joined


@pytest.mark.parametrize("most", [0.3, 2.0])
@pytest.mark.parametrize(
    ("k", "rest"), [(4, "drop"), (4, "renormalise"), (3, "bucket"), (3, "renormalise"), (3, "drop")]
)
def test_reverse_kl_has_the_mean_of_the_sampled_tokens_gradient_under_the_same_bound(k, rest, most):
    """By enumeration, in logits: Σ_k p_k clip(log p_k - log q_k, ±c) ∇log p_k."""
    value, gradient, metrics = dense(k, rest=rest, signal_at_most=most)
    student, teacher, _ = outcomes_np(k, rest)
    p, one = np.exp(student), 1 if rest == "drop" else 0
    signal = np.clip(student - teacher + one, -most, most)
    slopes = p * signal
    assert value == pytest.approx((slopes - one * p).sum(1))
    whole = np.exp(outcomes_np(4, "drop")[0])
    expected = np.zeros_like(whole)
    if rest == "renormalise":
        expected[:, :k] = slopes - p * slopes.sum(1, keepdims=True)
    else:  # ∂log p_k/∂z_j = 1[j = k] - p_j, of the tail 1[j in it] p_j / p_tail - p_j
        expected[:, :k] = slopes[:, :k]
        if slopes.shape[1] > k:
            expected[:, k:] = slopes[:, k:] * whole[:, k:] / p[:, k:]
        expected -= whole * slopes.sum(1, keepdims=True)
    assert gradient == pytest.approx(expected, abs=1e-12)
    acted = np.abs(student - teacher + one).max(1) > most
    assert metrics["signal_bounded"].tolist() == acted.tolist()


def test_over_the_whole_vocabulary_it_is_opd_over_all_tokens_by_their_probability():
    _, gradient, _ = dense(4, rest="renormalise", signal_at_most=1.5)
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(1)
    teacher = torch.tensor(FORBIDS, dtype=torch.float64).log_softmax(1)
    for position in range(2):
        for token in range(4):
            given = replace(
                batch([-1.0], [teacher[position, token].item()]),
                student_logp_N=logp[position, token : token + 1],
                behaviour_logp_N=logp[position, token : token + 1].detach(),
            )
            loss = Opd(signal_at_most=1.5).loss(given).loss_N.sum()
            (logp[position, token].detach().exp() * loss).backward(retain_graph=True)
    assert gradient == pytest.approx(logits.grad.numpy(), abs=1e-12)


def test_a_candidate_that_is_forbidden_loses_probability_below_any_bound():
    for most in (0.01, 0.5, 1.0, 10.0):
        _, gradient, _ = dense(4, rest="renormalise", signal_at_most=most)
        assert gradient[0, 2] > 0 and gradient[1, 0] > 0  # descent lowers its logit


@pytest.mark.parametrize("divergence", ["forward", "jensen_shannon"])
def test_what_is_bounded_by_itself_is_left_alone_and_scaled_below(divergence):
    free = dense(3, divergence=divergence)
    same = dense(3, divergence=divergence, signal_at_most=1.01)
    assert same[0] == pytest.approx(free[0]) and same[1] == pytest.approx(free[1])
    assert same[2]["signal_bounded"].tolist() == [False, False]
    half = dense(3, divergence=divergence, signal_at_most=0.05)
    student, teacher, _ = outcomes_np(3, "bucket")
    p, q = np.exp(student), np.exp(teacher)
    mixed = np.log((p + q) / 2)
    slopes = -q if divergence == "forward" else p * (student - mixed) / 2
    size = np.abs(slopes).sum(1)
    scale = np.minimum(1, 0.05 / size)
    assert half[0] == pytest.approx(free[0] * scale)
    assert half[1] == pytest.approx(free[1] * scale[:, None])
    assert half[2]["signal_bounded"].tolist() == (size > 0.05).tolist()


def test_both_parts_of_eopd_are_bounded_and_the_largest_of_their_factors_is():
    given = replace(
        batch([-1.0, -1.0], [-3001.0, -1.5], teacher_entropy_N=[2.0, 0.0]),
        student_logp_NK=torch.tensor([[0.25], [0.5]]).double().log().requires_grad_(),
        teacher_logp_NK=torch.tensor([[0.5], [0.5]]).double().log(),
    )
    objective = Eopd(k=1, rest="drop", alpha=4.0, signal_at_most=0.25)
    result = objective.loss(given)
    # .25 · 1 of 3000 nats, and 4 · .25 of .5 where the entropy is high
    assert result.advantage.tolist() == [-0.25, -0.25]
    assert result.loss_N.tolist() == pytest.approx([0.25 + 4 * 0.5 * 0.5 * log(2), 0.25])
    result.loss_N.sum().backward()
    assert given.student_logp_NK.grad.tolist() == [[pytest.approx(-4 * 0.25)], [0.0]]
    assert given.student_logp_N.grad.tolist() == pytest.approx([0.25, 0.25])
    lowered = Eopd(k=1, rest="drop", alpha=4.0, weight_at_most=2.0).loss(given)
    assert lowered.weight_N.tolist() == [0.5, 1.0]
    assert lowered.metrics["weight_bounded"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [e**3, 1.0]),
        ({"constant": 0.5}, [0.5 * e**3, 0.5]),
        ({"constant": 3.0}, [3 * e**3, 3.0]),
        ({"correction": Importance(at_most=1.5)}, [1.5, 1.0]),
        ({"correction": Importance(ratio="none"), "constant": 5.0}, [5.0, 5.0]),
        # g = exp(-3) and 1, over their mean
        (
            {"drift_gate": DriftGate(block=1)},
            [e**3 * exp(-3) / ((exp(-3) + 1) / 2 + 1e-6), 1 / ((exp(-3) + 1) / 2 + 1e-6)],
        ),
    ],
)
def test_the_product_of_weights_and_ratio_is_bounded_once(settings, factors):
    objective = Opd(weight_at_most=1.25, **settings)
    given = with_statistics(objective, batch([-1.0, -1.0], [-1.5, -0.5], behaviour=[-4.0, -1.0]))
    result = objective.loss(given)
    assert (result.weight_N * result.ratio).tolist() == pytest.approx(np.minimum(factors, 1.25))
    assert result.metrics["weight_bounded"].tolist() == [f > 1.25 for f in factors]
    expected = [-0.5 * min(factors[0], 1.25), 0.5 * min(factors[1], 1.25)]
    assert coefficients(objective, given) == pytest.approx(expected)


def test_what_is_not_selected_is_not_counted():
    given = batch([-1.0] * 4, [-9.0] * 4, behaviour=[-3.0] * 4)
    objective = Opd(random=RandomShare(share=0.5), signal_at_most=1.0, weight_at_most=1.0)
    metrics = objective.loss(given).metrics
    assert metrics["signal_bounded"].sum() == metrics["weight_bounded"].sum() == 2


class Squares(Objective, frozen=True, tag="squares"):
    """An objective of a user's, with a loss of its own that knows of no bound: ρ/2 · (log π_T -
    log π)² of the sampled token, and the entropy."""

    def token_loss(self, batch):
        student_N = declared(batch.student_logp_N)
        ratio_N = (student_N.detach() - batch.behaviour_logp_N).exp()
        loss_N = ratio_N / 2 * (batch.teacher_logp_N - student_N).square()
        return TokenLoss(
            loss_N=loss_N - ratio_N * declared(batch.student_entropy_N),
            weight_N=ratio_N.new_ones(len(ratio_N)),
            ratio=ratio_N,
        )


def test_an_objective_that_knows_of_no_bound_is_scaled_by_its_slopes():
    given = forbidding(behaviour=[x - log(2) for x in STUDENT], student_entropy_N=[0.5] * 6)
    given = replace(given, student_entropy_N=given.student_entropy_N.requires_grad_())
    free, bounded = Squares().loss(given), Squares(signal_at_most=1.25).loss(given)
    scale = [min(1.0, 1.25 / (abs(gap) + 1)) for gap in GAP]  # of both slopes, ρ apart
    assert bounded.metrics["signal_bounded"].tolist() == [s < 1 for s in scale]
    assert bounded.loss_N.tolist() == pytest.approx((free.loss_N.detach().numpy() * scale).tolist())
    leaves = [given.student_logp_N, given.student_entropy_N]
    slopes = [x.tolist() for x in torch.autograd.grad(bounded.loss_N.sum(), leaves)]
    assert slopes[0] == pytest.approx([-2 * g * s for g, s in zip(GAP, scale, strict=True)])
    assert slopes[1] == pytest.approx([-2 * s for s in scale])


class Sharpened(Opd, frozen=True, tag="sharpened"):
    """A user's `opd` that adds to the loss of the method it stands on: 1000 times the entropy."""

    def token_loss(self, batch):
        method = super().token_loss(batch)
        return replace(method, loss_N=method.loss_N + 1000 * declared(batch.student_entropy_N))


def test_what_a_users_file_adds_to_a_methods_loss_is_bounded_with_it():
    given = batch(STUDENT, TEACHER, student_entropy_N=[0.5] * 6)
    given = replace(given, student_entropy_N=given.student_entropy_N.requires_grad_())
    result = Sharpened(signal_at_most=2.0).loss(given)
    leaves = [given.student_logp_N, given.student_entropy_N]
    slopes = torch.stack(torch.autograd.grad(result.loss_N.sum(), leaves))
    assert slopes.abs().sum(0).tolist() == pytest.approx([2.0] * 6)
    assert result.metrics["signal_bounded"].all()


def test_a_bound_takes_no_gradient_through_what_the_learners_module_gave():
    """Only the learner's own backward may: its parameters are gathered by hooks."""
    passed, given = [], forbidding(student_entropy_N=[0.5] * 6)
    given = replace(given, student_entropy_N=given.student_entropy_N.requires_grad_())
    module_gave = given.student_logp_N * 1
    module_gave.register_hook(passed.append)
    result = Squares(signal_at_most=1.0).loss(replace(given, student_logp_N=module_gave))
    assert passed == [] and given.student_logp_N.grad is None
    result.loss_N.sum().backward()
    assert len(passed) == 1
