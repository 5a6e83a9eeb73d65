from dataclasses import replace
from math import exp, log

import pytest
import torch
from given import LENGTHS, batch, ragged, rows

from async_opd.objectives.eopd import Eopd
from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Ppo
from async_opd.wire import Needs


def with_candidates(given, student, teacher):
    """The batch with log-probs of these probabilities at the teacher's candidates."""
    student, teacher = (torch.tensor(p).double().log() for p in (student, teacher))
    return replace(given, student_logp_NK=student, teacher_logp_NK=teacher)


def test_forward_kl_is_added_at_tokens_where_the_teacher_is_uncertain():
    given = batch([-1.0, -1.0, -1.0], [-0.5, -0.5, -0.5], teacher_entropy_N=[0.79, 0.8, 3.0])
    given = with_candidates(given, [[0.25, 0.25]] * 3, [[0.5, 0.125]] * 3)
    more = {  # the student's are as they are; the teacher's are .5 and .125, or .8 and .2, or with a rest of .375
        "drop": 0.5 * 0.693147 + 0.125 * -0.693147,
        "renormalise": 0.8 * 1.163151 + 0.2 * -0.223144,  # ln(.8/.25), ln(.2/.25)
        "bucket": 0.5 * 0.693147 + 0.125 * -0.693147 + 0.375 * -0.287682,  # the student's rest is .5
    }
    for rest, expected in more.items():
        result = Eopd(k=2, alpha=2.0, rest=rest).loss(given)
        added = [0.0, 2 * expected, 2 * expected]
        assert (result.loss_N + 0.5).tolist() == pytest.approx(added, abs=1e-5)  # OPD's own: -ρ · A = -.5
        assert result.shown["uncertain"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("prefix", [None, PrefixRatio(at_most=1.5)], ids=str)
def test_loss_is_that_of_opd_and_a_loop(prefix):
    generator = torch.Generator().manual_seed(0)
    p_NV, q_NV = torch.randn(2, sum(LENGTHS), 5, generator=generator).double().softmax(-1)
    given = with_candidates(ragged(7), p_NV[:, :3].tolist(), q_NV[:, :3].tolist())
    expected = []
    columns = ("student_logp_N", "behaviour_logp_N", "student_logp_NK", "teacher_logp_NK", "teacher_entropy_N")
    for tokens in rows(given, *columns):
        before = 0.0
        for new, old, student, teacher, entropy in tokens:
            whole = sum(exp(q) for q in teacher)
            kl = sum(exp(q) / whole * (q - p) for p, q in zip(student, teacher, strict=True)) - log(whole)
            ratio = min(exp(before), 1.5) if prefix else 1.0
            expected.append(0.5 * ratio * kl if entropy >= 0.8 else 0.0)
            before += new - old
    result = Eopd(k=3, alpha=0.5, prefix=prefix).loss(given)
    plain = Opd(correction=Ppo()).loss(given)
    assert (result.loss_N - plain.loss_N).tolist() == pytest.approx(expected)
    assert (result.advantage - plain.advantage).abs().max() == 0


@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
def test_agreement_is_a_minimum_only_with_a_bucket_for_the_rest(rest):
    logits_NV = torch.randn(sum(LENGTHS), 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    logp_NV = logits_NV.log_softmax(-1)
    given = ragged(0)
    same = dict(
        student_logp_N=logp_NV[:, 0], behaviour_logp_N=logp_NV[:, 0].detach(), teacher_logp_N=logp_NV[:, 0].detach()
    )
    given = replace(given, **same, student_logp_NK=logp_NV[:, :3], teacher_logp_NK=logp_NV[:, :3].detach())
    objective = Eopd(k=3, rest=rest)
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N.sum(), logits_NV)
    assert bool(gradient_NV.abs().max() > 1e-6) == objective.learns_from_agreement == (rest != "bucket")


def test_the_settings_are_those_of_the_notes_on_the_paper():
    assert (Eopd().tau, Eopd().k, Eopd().alpha, Eopd().correction) == (0.8, 16, 1.0, Ppo(clip=0.2))
    assert Eopd().needs() == Needs(teacher_topk=16, teacher_entropy=True)
