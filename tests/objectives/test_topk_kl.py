from dataclasses import replace
from math import exp, log

import msgspec
import pytest
import torch
from given import LENGTHS, batch, ragged, rows, with_candidates

from async_opd.core.wire import Needs
from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs
from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.topk_kl import TopkKl


def one(student, teacher):
    """One position with candidates and, last, a tail of these probabilities."""
    student, teacher = (torch.tensor([p]).double().log() for p in (student, teacher))
    return replace(
        batch([-1.0], [-1.0]),
        student_logp_NK=student[:, :-1],
        teacher_logp_NK=teacher[:, :-1],
        student_tail_logp_N=student[:, -1],
        teacher_tail_logp_N=teacher[:, -1],
    )


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
    given = one(student=[0.25, 0.5, 0.25], teacher=[0.5, 0.125, 0.375])
    result = TopkKl(k=2, divergence=divergence).loss(given)
    assert result.loss_N.tolist() == pytest.approx([expected], abs=1e-6)
    assert result.weight_N.tolist() == [1.0] and result.ratio is None and result.advantage is None


SMALL = 1e-7  # of the student's probability, which 1 - Σ_k p_k in float32 is off by itself


@pytest.mark.parametrize(
    ("divergence", "value", "slope"),  # the slope is that in the log-mass of the tail
    [
        # .5 ln(.5/.6) + .45 ln(.45/.4) + .05 ln(.05/1e-7) = -.0911608 + .0530024 + .6561182
        ("forward", 0.617960, -0.05),
        # .6 ln(.6/.5) + .4 ln(.4/.45) + 1e-7 ln(1e-7/.05) = .1093929 - .0471132 - .0000013
        ("reverse", 0.062278, 1e-7 * (log(1e-7 / 0.05) + 1)),
        # m = (.55, .425, .025): half of .5 ln(.5/.55) + .45 ln(.45/.425) + .05 ln 2 = .0063618 and
        # half of .6 ln(.6/.55) + .4 ln(.4/.425) + 1e-7 ln(4e-6) = .0139778; slope .5 · 1e-7 ·
        # ln(4e-6)
        ("jensen_shannon", 0.020340, 0.5 * 1e-7 * log(1e-7 / 0.02500005)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_tail_that_all_but_vanishes_keeps_its_value_and_its_gradient(
    divergence, value, slope, temperature
):
    """In float32, from logits to loss: 40 ids of which the two likeliest are candidates."""
    tail_V = torch.full((38,), log(SMALL / 38))
    logits_1V = torch.cat([torch.tensor([log(0.6 - SMALL), log(0.4)]), tail_V])[None] * temperature
    head, hidden_1V = Head(torch.eye(40)), logits_1V.requires_grad_()
    options, ids_1K = ReadOptions(temperature, 1, tail=True), torch.tensor([[0, 1]])
    read = read_logprobs(hidden_1V, head, torch.tensor([0]), options, candidate_ids_NK=ids_1K)
    read.tail_N.retain_grad()
    given = replace(
        one(student=[0.6, 0.3, 0.1], teacher=[0.5, 0.45, 0.05]),
        student_logp_NK=read.candidates_NK,
        student_tail_logp_N=read.tail_N,
    )
    loss = TopkKl(k=2, divergence=divergence).loss(given).loss_N
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=2e-6)
    assert read.tail_N.grad.item() == pytest.approx(slope, rel=1e-4)


V, K = 6, 3


def candidates(support, seed=0):
    """A ragged batch with the log-probs of the K likeliest tokens of one of the two; gradients go
    to the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV, behaviour_NV, teacher_NV = (
        2 * torch.randn(3, sum(LENGTHS), V, generator=generator).double()
    )
    logits_NV.requires_grad_()
    ids_NK = (teacher_NV if support == "teacher" else behaviour_NV).topk(K).indices
    return with_candidates(
        ragged(seed), logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1), ids_NK
    ), logits_NV


def of(divergence, **settings):
    """A divergence over K candidates, of three tenths of the teacher where it is of a mixture."""
    mixture = dict(beta=0.3) if divergence == "jensen_shannon" else {}
    return TopkKl(k=K, divergence=divergence, **mixture, **settings)


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
def test_loss_is_that_of_a_loop_times_the_ratio_of_the_tokens_before(
    support, divergence, rest, prefix
):
    objective = of(divergence, support=support, rest=rest, prefix=prefix)
    given, _ = candidates(support)
    expected = []
    for tokens in rows(
        given, "student_logp_N", "behaviour_logp_N", "student_logp_NK", "teacher_logp_NK"
    ):
        before = 0.0
        for new, old, student, teacher in tokens:
            divergence = by_loop(objective, [exp(x) for x in student], [exp(x) for x in teacher])
            expected.append(PREFIXES[prefix](exp(before)) * divergence)
            before += new - old
    assert objective.loss(given).loss_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rest", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_the_gradient_is_that_of_finite_differences(divergence, rest):
    objective = of(divergence, rest=rest)
    given, logits_NV = candidates("teacher")
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N[0], logits_NV)
    teacher = given.teacher_logp_NK[0].exp().tolist()
    at_K = [
        next(v for v in range(V) if logits_NV.log_softmax(-1)[0, v] == x)
        for x in given.student_logp_NK[0]
    ]

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
    objective = of(divergence, rest=rest)
    logits_NV = (
        torch.randn(sum(LENGTHS), V, generator=torch.Generator().manual_seed(0))
        .double()
        .requires_grad_()
    )
    same_NV = logits_NV.log_softmax(-1)
    first_NK = torch.arange(K).expand(len(same_NV), K)
    given = with_candidates(ragged(0), same_NV, same_NV.detach(), first_NK)
    (gradient_NV,) = torch.autograd.grad(objective.loss(given).loss_N.sum(), logits_NV)
    assert bool(gradient_NV.abs().max() > 1e-6) == (
        rest == "drop" and divergence != "jensen_shannon"
    )


def test_the_teacher_is_asked_for_its_k_candidates_or_for_those_of_the_behaviour_policy():
    assert TopkKl(k=5).needs() == Needs(teacher_topk=5, tail=True)
    student = TopkKl(k=5, support="student").needs()
    assert student == Needs(teacher_at_student_ids=5, student_ids="likeliest", tail=True)


@pytest.mark.parametrize("rest", ["renormalise", "drop"])
def test_the_tail_is_read_only_where_it_is_an_outcome(rest):
    assert TopkKl(k=5, rest=rest).needs() == Needs(teacher_topk=5)
    given = one(student=[0.25, 0.5, 0.25], teacher=[0.5, 0.125, 0.375])
    without = replace(given, student_tail_logp_N=None, teacher_tail_logp_N=None)
    objective = TopkKl(k=2, rest=rest)
    assert objective.loss(without).loss_N.tolist() == objective.loss(given).loss_N.tolist()


def test_no_candidates_at_all_are_refused():
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.convert({"k": 0, "tag": "topk_kl"}, TopkKl)


def test_one_candidate_that_is_renormalised_is_refused():
    with pytest.raises(ValueError, match="k = 1: must be > 1 with rest = 'renormalise'"):
        TopkKl(k=1, rest="renormalise")


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_share_of_the_mixture_is_refused_without_one(divergence):
    with pytest.raises(
        ValueError, match=rf"beta = 0\.3: has no effect with divergence = '{divergence}'"
    ):
        TopkKl(k=2, divergence=divergence, beta=0.3)
