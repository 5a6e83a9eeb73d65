from dataclasses import replace
from math import exp, log

import msgspec
import pytest
import torch
from given import LENGTHS, batch, ragged, rows

from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.topk_kl import TopkKl
from async_opd.wire import Needs


def one(student, teacher):
    """One position with candidates of these probabilities."""
    given = batch([-1.0], [-1.0])
    logp = {name: torch.tensor([p]).double().log() for name, p in dict(student=student, teacher=teacher).items()}
    return replace(given, student_logp_NK=logp["student"], teacher_logp_NK=logp["teacher"])


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward", 0.325336),  # .5 ln(.5/.25) + .125 ln(.125/.5) + .375 ln(.375/.25)
        ("reverse", 0.418494),  # .25 ln(.25/.5) + .5 ln(.5/.125) + .25 ln(.25/.375)
        # half of .5 ln 4/3 + .125 ln .4 + .375 ln 1.2 + .25 ln 2/3 + .5 ln 1.6 + .25 ln .8
        ("jensen_shannon", 0.087763),
    ],
)
def test_the_rest_of_the_vocabulary_is_one_more_outcome(divergence, expected):
    result = TopkKl(k=2, divergence=divergence).loss(one(student=[0.25, 0.5], teacher=[0.5, 0.125]))
    assert result.loss_N.tolist() == pytest.approx([expected], abs=1e-6)
    assert result.weight_N.tolist() == [1.0] and result.ratio is None and result.advantage is None


V, K = 6, 3


def candidates(support, seed=0):
    """A ragged batch with the log-probs of the K likeliest tokens of one of the two; gradients go to the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV, behaviour_NV, teacher_NV = 2 * torch.randn(3, sum(LENGTHS), V, generator=generator).double()
    logits_NV.requires_grad_()
    student_NV, teacher_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    ids_NK = (teacher_NV if support == "teacher" else behaviour_NV).topk(K).indices
    given = replace(
        ragged(seed), student_logp_NK=student_NV.gather(1, ids_NK), teacher_logp_NK=teacher_NV.gather(1, ids_NK)
    )
    return given, logits_NV


def normalised(p, rest):
    if rest == "drop":
        return p
    return [x / sum(p) for x in p] if rest == "renormalise" else [*p, 1 - sum(p)]


def by_loop(objective, student, teacher):
    """The divergence at one position, from probabilities of the candidates."""
    s, t = normalised(student, objective.rest), normalised(teacher, objective.rest)
    kl = lambda p, q: sum(a * log(a / b) for a, b in zip(p, q, strict=True))  # noqa: E731
    if objective.divergence == "jensen_shannon":
        middle = [objective.beta * b + (1 - objective.beta) * a for a, b in zip(s, t, strict=True)]
        return objective.beta * kl(t, middle) + (1 - objective.beta) * kl(s, middle)
    return kl(t, s) if objective.divergence == "forward" else kl(s, t)


PREFIXES = {
    None: lambda rho: 1.0,
    PrefixRatio(): lambda rho: rho,
    PrefixRatio(at_most=1.5): lambda rho: min(rho, 1.5),
    PrefixRatio(between=(0.3, 3.0)): lambda rho: rho if 0.3 <= rho <= 3 else 0.0,
}


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_loss_is_that_of_a_loop_times_the_ratio_of_the_tokens_before(support, divergence, rest, prefix):
    objective = TopkKl(k=K, support=support, divergence=divergence, rest=rest, prefix=prefix, beta=0.3)
    given, _ = candidates(support)
    expected = []
    for tokens in rows(given, "student_logp_N", "behaviour_logp_N", "student_logp_NK", "teacher_logp_NK"):
        before = 0.0
        for new, old, student, teacher in tokens:
            divergence = by_loop(objective, [exp(x) for x in student], [exp(x) for x in teacher])
            expected.append(PREFIXES[prefix](exp(before)) * divergence)
            before += new - old
    assert objective.loss(given).loss_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_the_gradient_is_that_of_finite_differences(divergence, rest):
    objective = TopkKl(k=K, divergence=divergence, rest=rest, beta=0.3)
    given, logits_NV = candidates("teacher")
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N[0], logits_NV)
    teacher = given.teacher_logp_NK[0].exp().tolist()
    at_K = [next(v for v in range(V) if logits_NV.log_softmax(-1)[0, v] == x) for x in given.student_logp_NK[0]]

    def loss(logits_V):
        return by_loop(objective, logits_V.softmax(0)[at_K].tolist(), teacher)

    at_V, steps = logits_NV[0].detach(), 1e-5 * torch.eye(V).double()
    expected = [(loss(at_V + h) - loss(at_V - h)) / 2e-5 for h in steps]
    assert gradient_NV[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_the_ratio_of_the_prefix_carries_no_gradient():
    given, _ = candidates("teacher")
    loss = TopkKl(k=K, prefix=PrefixRatio()).loss(given).loss_N.sum()
    assert torch.autograd.grad(loss, given.student_logp_N, allow_unused=True) == (None,)


@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_agreement_is_a_minimum_unless_it_is_declared_otherwise(divergence, rest):
    objective = TopkKl(k=K, divergence=divergence, rest=rest, beta=0.3)
    logits_NV = torch.randn(sum(LENGTHS), V, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    same_NK = logits_NV.log_softmax(-1)[:, :K]
    given = replace(ragged(0), student_logp_NK=same_NK, teacher_logp_NK=same_NK.detach())
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N.sum(), logits_NV)
    assert bool(gradient_NV.abs().max() > 1e-6) == objective.learns_from_agreement


def test_the_teacher_is_asked_for_its_k_candidates_or_for_those_of_the_behaviour_policy():
    assert TopkKl(k=5).needs() == Needs(teacher_topk=5)
    assert TopkKl(k=5, support="student").needs() == Needs(teacher_at_student_ids=5, student_ids="likeliest")


def test_no_candidates_at_all_are_refused():
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.convert({"k": 0, "tag": "topk_kl"}, TopkKl)
