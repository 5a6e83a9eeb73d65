"""A fixed negative advantage: numbers of the reference, and why the ratio is essential."""

import pytest
import torch
from batches import LENGTHS, STUDENT, TEACHER, batch, ragged, with_statistics
from test_identities import OLD, of_actions
from test_identities import STUDENT as LOGITS

from async_opd.objectives.opsa import Opsa
from async_opd.objectives.sampled import Importance

ENTROPY = [0.05, 2.0, 1.5, 0.1, 3.0, 2.8]


def test_the_lowest_third_by_the_students_own_log_probs():
    objective = Opsa(share=1 / 3)
    given = batch(STUDENT, TEACHER, student_entropy_N=ENTROPY)
    result = objective.loss(with_statistics(objective, given))
    assert result.selected_N.tolist() == [False, True, False, True, False, False]
    assert [result.advantage[n].item() for n in (3, 1)] == [-0.5, -1.0]
    assert Opsa(share=1 / 3, entropy=False).loss(given).advantage.tolist() == [-0.5] * 6


def test_the_range_is_that_of_the_step_and_one_value_is_no_range():
    objective = Opsa(share=1.0)
    given = batch(STUDENT, TEACHER, student_entropy_N=ENTROPY)
    found = objective.loss(with_statistics(objective, given)).advantage.tolist()
    assert [found[3], found[1]] == pytest.approx([-0.508475, -0.830508], abs=1e-6)
    alone = batch([-1.0], [-1.0], student_entropy_N=[0.7])
    assert objective.loss(with_statistics(objective, alone)).advantage.tolist() == [-0.5]


def test_the_share_of_each_response_by_a_plain_loop():
    given = ragged(1)
    found, start = Opsa(share=0.3).selection(given).tolist(), 0
    for length in LENGTHS:
        logps = given.student_logp_N[start : start + length].tolist()
        chosen = sorted(range(length), key=lambda t: logps[t])[: -(-3 * length // 10)]
        assert found[start : start + length] == [t in chosen for t in range(length)]
        start += length


def expected_gradient(correction, tokens):
    """Over the four actions; only these are trained."""
    logits = LOGITS.clone().requires_grad_()
    objective = Opsa(share=1.0, entropy=False, correction=correction)
    loss_N = objective.loss(of_actions(logits)).loss_N
    (OLD.softmax(0) * loss_N)[tokens].sum().backward()
    return logits.grad.tolist()


@pytest.mark.parametrize(
    ("correction", "tokens", "expected"),
    [
        (Importance(), [0, 1, 2, 3], [0.0] * 4),
        (Importance(ratio="none"), [0, 1, 2, 3], [0.083307, 0.023639, -0.123307, 0.016361]),
        (Importance(), [3], [-0.014175, -0.008598, -0.017314, 0.040087]),
        (Importance(ratio="none"), [3], [-0.019452, -0.011798, -0.023759, 0.055010]),
    ],
    ids=str,
)
def test_a_constant_on_all_tokens_is_nothing_with_the_ratio_and_pushes_away_without(
    correction, tokens, expected
):
    assert expected_gradient(correction, tokens) == pytest.approx(expected, abs=1e-6)


def test_it_asks_for_no_more_than_the_entropy():
    assert Opsa().needs().student_entropy and Opsa().needs().first_pass
    assert not Opsa(entropy=False).needs().first_pass
    assert torch.equal(
        Opsa(share=0.5, entropy=False).selection(batch([-1.0] * 2, [-9.0] * 2)),
        torch.tensor([True, False]),
    )
