"""What the gradients estimate, and which methods are which under which settings."""

from dataclasses import replace

import pytest
import torch
from batches import LENGTHS, batch, ragged, with_statistics

from async_opd.maths.advantages import Moments
from async_opd.objectives.cl_egrsd import ClEgrsd
from async_opd.objectives.dear import Dear
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.g_opd import GOpd
from async_opd.objectives.iw_opd import IwOpd
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo
from async_opd.objectives.sg_opd import SgOpd

STUDENT = torch.tensor([0.3, -0.2, 0.5, -1.0]).double()  # logits over four actions
OLD = torch.tensor([0.8, 0.1, -0.4, -0.6]).double()
TEACHER = torch.tensor([1.0, 0.0, -0.5, 0.2]).double()
# finite differences of KL(π‖π_T) in the student's logits
TRUE = [-0.233373, -0.043735, 0.384659, -0.107552]
CACHED = [-0.040036, 0.034405, 0.069283, -0.063651]
UNCORRECTED = [-0.170218, 0.040712, 0.230898, -0.101393]


def of_actions(logits, **more):
    """One position with each action as its sampled token, in turn; gradients go to `logits`."""
    old, teacher = (x.log_softmax(0).tolist() for x in (OLD, TEACHER))
    given = batch([0.0] * 4, teacher, behaviour=old, lengths=[1] * 4, **more)
    return replace(given, student_logp_N=logits.log_softmax(0))


def expected_gradient(objective):
    """Expectation of the gradient over all four actions, each sampled under the old policy."""
    logits = STUDENT.clone().requires_grad_()
    (OLD.softmax(0) * objective.loss(of_actions(logits)).loss_N).sum().backward()
    return logits.grad.tolist()


def test_the_true_gradient_is_that_of_finite_differences():
    def kl(logits):
        p, q = logits.softmax(0), TEACHER.softmax(0)
        return (p * (p / q).log()).sum().item()

    steps = 1e-5 * torch.eye(4).double()
    assert [(kl(STUDENT + h) - kl(STUDENT - h)) / 2e-5 for h in steps] == pytest.approx(
        TRUE, abs=1e-6
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Opd(), TRUE),
        (Opd(correction=Importance(ratio="sequence")), TRUE),  # of one token
        (Opd(student_signal="cached"), CACHED),
        (Opd(correction=Importance(ratio="none")), UNCORRECTED),
        (GOpd(lam=1.0), TRUE),
        (IwOpd(gamma=0.0), TRUE),
    ],
    ids=str,
)
def test_the_expected_gradient_on_stale_samples_is_that_of_the_kl_only_if_recomputed_and_corrected(
    objective, expected
):
    assert expected_gradient(objective) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "correction",
    [Importance(), Importance(ratio="sequence"), Importance(ratio="geometric")],
    ids=str,
)
def test_each_of_several_samples_is_corrected_by_its_own_ratio(correction):
    """Expectation over all pairs of a generated token and a sample beside it; of one token all
    three ratios are ρ."""
    logits = STUDENT.clone().requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    student, old, teacher = (x.log_softmax(0)[pairs] for x in (logits, OLD, TEACHER))
    given = batch([0.0] * 16, [0.0] * 16, lengths=[1] * 16)
    columns = dict(student_logp=student, behaviour_logp=old, teacher_logp=teacher)
    given = replace(given, **{f"{name}_N": x[:, 0] for name, x in columns.items()})
    given = replace(given, **{f"{name}_NK": x[:, 1:] for name, x in columns.items()})
    (old.sum(1).exp() * McOpd(m=2, correction=correction).loss(given).loss_N).sum().backward()
    assert logits.grad.tolist() == pytest.approx(TRUE, abs=1e-6)


def mc_gradients(m, trials, seed):
    """Gradients [trials, 4] of MC-m at the one prefix, on samples of the old policy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(OLD.softmax(0), trials * m, replacement=True, generator=generator).view(
        trials, m
    )
    logits = STUDENT.expand(trials, 4).clone().requires_grad_()
    student, old, teacher = (
        x.log_softmax(-1).expand(trials, 4).gather(1, ids) for x in (logits, OLD, TEACHER)
    )
    given = batch([0.0] * trials, [0.0] * trials, lengths=[1] * trials)
    columns = dict(student_logp=student, behaviour_logp=old, teacher_logp=teacher)
    given = replace(given, **{f"{name}_N": x[:, 0] for name, x in columns.items()})
    given = replace(
        given, **{f"{name}_NK": x[:, 1:] for name, x in columns.items()} if m > 1 else {}
    )
    McOpd(m=m).loss(given).loss_N.sum().backward()
    return logits.grad


@pytest.mark.parametrize("m", [1, 4, 16])
def test_more_samples_are_unbiased_too_and_their_variance_falls_as_one_over_m(m):
    gradients = mc_gradients(m, 40_000, seed=m)
    one = mc_gradients(1, 40_000, seed=0).var(0).sum()
    # the mean of 40,000 is off by more than five of its standard errors with a probability under
    # 1e-5; the variance of bounded terms is known to about 1 %, and 10 % is far outside
    assert (
        (gradients.mean(0) - torch.tensor(TRUE)).abs() < 5 * gradients.std(0) / 200 + 1e-6
    ).all()
    assert gradients.var(0).sum().item() == pytest.approx(one.item() / m, rel=0.1)


# --- one method as a setting of another
# -----------------------------------------------------------------------------


@pytest.fixture
def given():
    """A stale batch in which every method has what it needs."""
    hidden_ND = torch.randn(sum(LENGTHS), 3, generator=torch.Generator().manual_seed(0))
    return ragged(4, hidden_ND=hidden_ND)


def assert_same(left, right, given):
    """Losses, weights and gradients of the two are equal."""
    parts = []
    for objective in (left, right):
        prepared = with_statistics(objective, given)
        result = objective.loss(prepared)
        (gradient_N,) = torch.autograd.grad(result.loss_N.sum(), prepared.student_logp_N)
        parts.append((result.loss_N.detach(), result.weight_N, result.selected_N, gradient_N))
    torch.testing.assert_close(*parts, rtol=1e-12, atol=1e-12)


CORRECTIONS = [Importance(), Importance(ratio="geometric"), Ppo()]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize(
    "objective",
    [GOpd(lam=1.0), IwOpd(gamma=0.0), Dear(p=1.0), McOpd(m=1), SgOpd(lambda_high=1.0, tau=100.0)],
    ids=lambda objective: type(objective).__name__,
)
def test_each_is_opd_where_its_own_part_is_off(objective, correction, given):
    settings = {name: getattr(objective, name) for name in objective.__struct_fields__} | dict(
        correction=correction
    )
    assert_same(type(objective)(**settings), Opd(correction=correction), given)


def test_iw_opd_with_lambda_and_without_gamma_is_g_opd(given):
    assert_same(IwOpd(gamma=0.0, lam=1.25), GOpd(lam=1.25), given)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_a_window_of_nothing_turns_cl_egrsd_into_egrsd(gamma, given):
    for step in (3, 12):
        prepared = replace(given, step=step, running={"reward": Moments(7.0, 0.6, 2.0)})
        assert_same(ClEgrsd(window=0, gamma=gamma), Egrsd(gamma=gamma), prepared)


def test_without_gamma_egrsd_is_its_baseline_reward_times_direction(given):
    given = replace(given, running={"reward": Moments()})
    objective = Egrsd(gamma=0.0, length_bonus=0.0)
    result, expected = objective.loss(with_statistics(objective, given)), []
    for s, reward in enumerate(given.reward_S.tolist()):
        a = 0.0 if reward != reward else reward - 0.5
        gaps = (given.teacher_logp_N - given.student_logp_N)[given.segment_N == s].detach()
        expected.append(a * (gaps * (a > 0) - gaps * (a < 0)).exp().clamp(0.8, 1.2))
    torch.testing.assert_close(result.weight_N * result.advantage, torch.cat(expected))
