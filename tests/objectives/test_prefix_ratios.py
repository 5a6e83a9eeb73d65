"""Ratios of a prefix as corrections, against published numbers, a plain loop and two steps by
enumeration."""

from dataclasses import replace
from math import exp, isnan, sqrt

import msgspec
import pytest
import torch
from batches import LENGTHS, STUDENT, TEACHER, batch, coefficients, ragged

from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo

BEHAVIOUR = [-0.15, -1.00, -0.05, -2.50, -0.30, -0.05]
PRODUCT = [1.051271, 0.860708, 0.860708, 1.051271, 0.951229, 0.980199]
NORMALISED = [1.051271, 0.927743, 0.951229, 1.012578, 0.990050, 0.996672]
GATED = [-0.052564, 0.0, 0.0, -0.506289, 0.0, 0.009967]


def prefix(**settings):
    return Opd(correction=Importance(ratio="prefix", **settings))


def normalised(**settings):
    return Opd(correction=Importance(ratio="prefix_normalised", **settings))


def six():
    return batch(STUDENT, TEACHER, behaviour=BEHAVIOUR)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (prefix(), PRODUCT),
        (prefix(at_most=1.0), [min(x, 1.0) for x in PRODUCT]),
        (normalised(), NORMALISED),
        (normalised(narrowing=(0.02, 0.025)), [1.051271, 0, 0, 1.012578, 0.990050, 0.996672]),
        (normalised(narrowing=(7e-4, 9.5e-4)), [0.0] * 6),  # of 15,360 tokens, on six
    ],
)
def test_the_ratios_are_those_of_the_reference(objective, expected):
    result = objective.loss(six())
    assert result.ratio.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.selected_N.all()  # what the gate rejects stays in the divisor
    advantage = [t - s for s, t in zip(STUDENT, TEACHER, strict=True)]
    assert coefficients(objective, six()) == pytest.approx(
        [r * a for r, a in zip(expected, advantage, strict=True)], abs=4e-6
    )


def test_the_gated_coefficients_are_those_of_the_reference():
    found = coefficients(normalised(narrowing=(0.02, 0.025)), six())
    assert found == pytest.approx(GATED, abs=1e-6)


def test_what_the_gate_keeps_is_shown_by_quarter_of_the_response():
    objective = normalised(narrowing=(0.02, 0.025))
    metrics = objective.loss(six()).metrics
    quarters = [1, 1, 2, 3, 3, 4]  # of six tokens
    for quarter in (1, 2, 3, 4):
        column = metrics[f"prefix_kept_{quarter}"].tolist()
        kept = [1, 0, 0, 1, 1, 1]
        assert [isnan(x) for x in column] == [q != quarter for q in quarters]
        assert [x for x in column if not isnan(x)] == [
            k for k, q in zip(kept, quarters, strict=True) if q == quarter
        ]
    assert list(metrics) == objective.metric_names
    assert not prefix().metric_names and not normalised().metric_names


@pytest.mark.parametrize("ratio", ["prefix", "prefix_normalised"])
def test_against_a_plain_loop(ratio):
    given, found = ragged(7), []
    gate = {"narrowing": (0.2, 0.3)} if ratio == "prefix_normalised" else {}
    result = Opd(correction=Importance(ratio=ratio, **gate)).loss(given)
    logs = (given.student_logp_N - given.behaviour_logp_N).tolist()
    for s, length in enumerate(LENGTHS):
        start, total = sum(LENGTHS[:s]), 0.0
        for t in range(1, length + 1):
            total += logs[start + t - 1]
            if ratio == "prefix":
                found.append(exp(total))
                continue
            w, h = exp(total / t), sqrt(length / t)
            found.append(w if 1 - 0.2 * h <= w <= 1 + 0.3 * h else 0.0)
    assert result.ratio.tolist() == pytest.approx(found)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Importance(ratio="prefix"), -0.164779),
        (Importance(), -0.094160),
        (Importance(ratio="prefix_normalised"), -0.131768),
        (Importance(ratio="none"), -0.106192),
    ],
    ids=str,
)
def test_only_the_product_is_exact_under_the_live_students_own_prefixes(correction, expected):
    """Two steps: a is taken with .7, under the old policy with .4; then one of two tokens."""
    logits = torch.tensor([0.6, 0.4]).double().log().requires_grad_()
    student = logits.log_softmax(0)
    old, teacher = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.8, 0.2]).double().log()
    first = torch.tensor([0.7, 0.4]).double().log()
    given = batch([0.0] * 4, [0.0] * 4, lengths=[2, 2])
    given = replace(
        given,
        student_logp_N=torch.stack([first[0], student[0], first[0], student[1]]),
        behaviour_logp_N=torch.stack([first[1], old[0], first[1], old[1]]),
        teacher_logp_N=torch.stack([first[0], teacher[0], first[0], teacher[1]]),
    )
    loss_N = Opd(correction=correction).loss(given).loss_N
    (0.4 * 0.5 * (loss_N[1] + loss_N[3])).backward()
    assert logits.grad[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ratio", ["prefix", "prefix_normalised"])
def test_each_of_several_samples_ends_the_prefix_in_its_own_way(ratio):
    given = batch([-1.0, -1.0], [-1.0, -1.0], behaviour=[-1.5, -0.8])  # log ρ .5, -.2
    given = replace(
        given,
        student_logp_NK=torch.tensor([[-1.0], [-2.0]]).double(),
        behaviour_logp_NK=torch.tensor([[-1.1], [-2.4]]).double(),  # log ρ .1, .4
        teacher_logp_NK=torch.tensor([[-1.0], [-1.0]]).double(),
    )
    found = McOpd(m=2, correction=Importance(ratio=ratio)).loss(given).ratio
    power = 1 / 2 if ratio == "prefix_normalised" else 1
    expected = [[exp(0.5), exp(0.1)], [exp(0.3 * power), exp(0.9 * power)]]
    assert found.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"narrowing": [0.1, 0.1]}, "narrowing = (0.1, 0.1): has no effect with ratio = 'token'"),
        (
            {"ratio": "prefix", "narrowing": [0.1, 0.1]},
            "narrowing = (0.1, 0.1): has no effect with ratio = 'prefix'",
        ),
    ],
)
def test_a_gate_of_another_ratio_is_refused(settings, message):
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(settings | {"tag": "importance"}, Importance)
    assert message in str(refused.value)


def test_ppo_has_no_ratio_of_a_prefix():
    with pytest.raises(msgspec.ValidationError, match="ratio"):
        msgspec.convert({"tag": "ppo", "ratio": "prefix"}, Ppo)
