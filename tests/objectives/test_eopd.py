from dataclasses import replace
from math import exp, log
from pathlib import Path

import pytest
import torch
from given import LENGTHS, batch, coefficients, ragged, rows, with_candidates

import async_opd
from async_opd.config.load import load
from async_opd.core.wire import Needs
from async_opd.objectives.eopd import Eopd
from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Ppo

CONFIG = Path(async_opd.__file__).parents[1] / "configs/eopd.toml"
FIRST = torch.arange(3).expand(sum(LENGTHS), 3)  # three candidates at each position, the first ids


def of_probabilities(given, student, teacher):
    """The batch with candidates and, last, a tail of these probabilities at each position."""
    student, teacher = (
        torch.tensor(p).double().log().expand(len(given.segment_N), -1) for p in (student, teacher)
    )
    return replace(
        given,
        student_logp_NK=student[:, :-1],
        teacher_logp_NK=teacher[:, :-1],
        student_tail_logp_N=student[:, -1],
        teacher_tail_logp_N=teacher[:, -1],
    )


def test_the_shipped_config_takes_the_advantage_of_the_policy_that_sampled_as_the_code_does():
    published = load(CONFIG).objective
    # under τ: no forward KL is added
    given = batch([-1.0], [-0.7], behaviour=[-1.1], teacher_entropy_N=[0.79])
    given = of_probabilities(given, [0.25] * 16 + [0.5], [0.05] * 16 + [0.2])
    # ρ · (log π_T - log π_O) = e^.1 · .4; of the live student it would be e^.1 · .3
    assert coefficients(published, given) == pytest.approx([0.442068], abs=1e-6)
    live = Eopd(k=16, student_signal="live")
    assert coefficients(live, given) == pytest.approx([0.331551], abs=1e-6)


def test_the_shipped_config_clips_above_one_and_a_fifth_and_has_no_dual_clip():
    given = batch(
        [-1.0, -1.0],
        [-1.5, -1.5],
        behaviour=[-1.3, -3.0],
        lengths=[1, 1],
        teacher_entropy_N=[0.0, 0.0],
    )
    given = of_probabilities(given, [0.05] * 16 + [0.2], [0.05] * 16 + [0.2])
    # A cached: -1.5 + 1.3 = -.2 under ρ = e^.3, and -1.5 + 3 = 1.5 under ρ = e², which is over the
    # clip
    assert coefficients(load(CONFIG).objective, given) == pytest.approx(
        [-0.2 * 1.349859, 0.0], abs=1e-6
    )
    # A -7.7 and -6: ρ stays as it is
    worse = replace(given, teacher_logp_N=torch.tensor([-9.0, -9.0]).double())
    assert coefficients(load(CONFIG).objective, worse) == pytest.approx(
        [-7.7 * 1.349859, -6 * 7.389056], abs=1e-5
    )


def test_the_shipped_config_adds_renormalised_forward_kl_from_eight_tenths_of_a_nat_on():
    # agreed: nothing but what is added
    given = batch([-1.0, -1.0], [-1.0, -1.0], teacher_entropy_N=[0.79, 0.8])
    given = of_probabilities(given, [0.03] * 16 + [0.52], [0.05] * 16 + [0.2])
    # Σ_16 1/16 (ln 1/16 - ln .03): the teacher over the 16, the student as it is
    added = log(1 / 16 / 0.03)
    assert load(CONFIG).objective.loss(given).loss_N.tolist() == pytest.approx([0.0, added])


def test_forward_kl_is_added_at_tokens_where_the_teacher_is_uncertain():
    given = batch([-1.0, -1.0, -1.0], [-0.5, -0.5, -0.5], teacher_entropy_N=[0.79, 0.8, 3.0])
    given = of_probabilities(given, [0.25, 0.25, 0.5], [0.5, 0.125, 0.375])
    # the student's are as they are; the teacher's are .5 and .125, or .8 and .2, or with a tail of
    # .375
    more = {
        "drop": 0.5 * 0.693147 + 0.125 * -0.693147,
        "renormalise": 0.8 * 1.163151 + 0.2 * -0.223144,  # ln(.8/.25), ln(.2/.25)
        # the student's tail is .5
        "bucket": 0.5 * 0.693147 + 0.125 * -0.693147 + 0.375 * -0.287682,
    }
    for rest, expected in more.items():
        result = Eopd(k=2, alpha=2.0, rest=rest).loss(given)
        added = [0.0, 2 * expected, 2 * expected]
        # OPD's own: -ρ · A = -.5
        assert (result.loss_N + 0.5).tolist() == pytest.approx(added, abs=1e-5)
        assert result.metrics["uncertain"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("prefix", [None, PrefixRatio(at_most=1.5)], ids=str)
def test_loss_is_that_of_opd_and_a_loop(prefix):
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (
        torch.randn(2, sum(LENGTHS), 5, generator=generator).double().log_softmax(-1)
    )
    given = with_candidates(ragged(7), student_NV, teacher_NV, FIRST)
    expected = []
    columns = (
        "student_logp_N",
        "behaviour_logp_N",
        "student_logp_NK",
        "teacher_logp_NK",
        "teacher_entropy_N",
    )
    for tokens in rows(given, *columns):
        before = 0.0
        for new, old, student, teacher, entropy in tokens:
            whole = sum(exp(q) for q in teacher)
            kl = sum(exp(q) / whole * (q - p) for p, q in zip(student, teacher, strict=True)) - log(
                whole
            )
            ratio = min(exp(before), 1.5) if prefix else 1.0
            expected.append(0.5 * ratio * kl if entropy >= 0.8 else 0.0)
            before += new - old
    result = Eopd(k=3, alpha=0.5, prefix=prefix).loss(given)
    plain = Opd(correction=Ppo()).loss(given)
    assert (result.loss_N - plain.loss_N).tolist() == pytest.approx(expected)
    assert (result.advantage - plain.advantage).abs().max() == 0


@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
def test_agreement_is_a_minimum_only_with_a_bucket_for_the_rest(rest):
    logits_NV = (
        torch.randn(sum(LENGTHS), 5, generator=torch.Generator().manual_seed(0))
        .double()
        .requires_grad_()
    )
    logp_NV = logits_NV.log_softmax(-1)
    given = ragged(0)
    same = dict(
        student_logp_N=logp_NV[:, 0],
        behaviour_logp_N=logp_NV[:, 0].detach(),
        teacher_logp_N=logp_NV[:, 0].detach(),
    )
    given = replace(with_candidates(given, logp_NV, logp_NV.detach(), FIRST), **same)
    objective = Eopd(k=3, rest=rest)
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N.sum(), logits_NV)
    assert bool(gradient_NV.abs().max() > 1e-6) == (rest != "bucket")


def test_all_tokens_are_uncertain_to_a_threshold_of_nothing_and_need_no_entropy():
    assert Eopd(k=4).needs() == Needs(teacher_topk=4, teacher_entropy=True)
    assert Eopd(k=4, tau=0.0).needs() == Needs(teacher_topk=4)
    given = batch([-1.0], [-1.0], teacher_entropy_N=[0.0])
    given = of_probabilities(given, [0.25, 0.25, 0.5], [0.5, 0.125, 0.375])
    expected = [0.8 * 1.163151 + 0.2 * -0.223144]  # ln(.8/.25), ln(.2/.25)
    for entropy_N in (given.teacher_entropy_N, None):
        result = Eopd(k=2, tau=0.0).loss(replace(given, teacher_entropy_N=entropy_N))
        assert result.loss_N.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_tail_is_asked_for_where_it_is_an_outcome():
    assert Eopd(k=4, rest="bucket").needs() == Needs(
        teacher_topk=4, teacher_entropy=True, tail=True
    )
