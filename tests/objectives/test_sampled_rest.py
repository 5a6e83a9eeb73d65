"""`topk_kl` whose rest is the sampled token, on one prefix where every action can be enumerated."""

from dataclasses import replace

import pytest
import torch
from batches import LENGTHS, batch, ragged
from test_identities import OLD, STUDENT, TEACHER, TRUE, of_actions

from async_opd.maths import divergences
from async_opd.objectives.modifiers import PrefixRatio
from async_opd.objectives.opd import Opd
from async_opd.objectives.topk_kl import TopkKl

HEAD_ONLY = [-0.162818, -0.212523, 0.470834, -0.095493]
BUCKET = [-0.222672, -0.120784, 0.397729, -0.054272]
FORM_I_WITHOUT_RATIO = [-0.250726, -0.003126, 0.363464, -0.109612]
MIXED = [-0.141926, -0.183896, 0.496352, -0.170530]


def of_k(ids):
    """The four actions, with the candidates of these ids at each, and the logits."""
    logits = STUDENT.clone().requires_grad_()
    student, teacher = logits.log_softmax(0), TEACHER.log_softmax(0)
    others = [i for i in range(4) if i not in ids]
    tails = [x[others].logsumexp(0).expand(4) if others else None for x in (student, teacher)]
    given = replace(
        of_actions(logits),
        targets_N=torch.arange(4),
        candidate_ids_NK=torch.tensor(ids).expand(4, -1),
        student_logp_NK=student[ids].expand(4, -1),
        teacher_logp_NK=teacher[ids].expand(4, -1),
        student_tail_logp_N=tails[0],
        teacher_tail_logp_N=tails[1],
    )
    return given, logits


def expected_gradient(loss_N, logits):
    (OLD.softmax(0) * loss_N).sum().backward()
    return logits.grad.tolist()


@pytest.mark.parametrize("ids", [[0, 2], [1], [3, 1, 0], [0, 1, 2, 3]], ids=str)
def test_in_the_mean_it_is_the_gradient_over_the_whole_vocabulary(ids):
    given, logits = of_k(ids)
    loss_N = TopkKl(k=len(ids), rest="sampled").loss(given).loss_N
    assert expected_gradient(loss_N, logits) == pytest.approx(TRUE, abs=1e-6)


@pytest.mark.parametrize(("rest", "expected"), [("bucket", BUCKET), ("drop", HEAD_ONLY)])
def test_a_bucket_and_the_head_alone_have_other_gradients(rest, expected):
    given, logits = of_k([0, 2])
    loss_N = TopkKl(k=2, rest=rest).loss(given).loss_N
    assert expected_gradient(loss_N, logits) == pytest.approx(expected, abs=1e-6)


def form(given, *, differentiated, plus_one, with_ratio):
    """A head and a tail as the published pieces of code have them."""
    student_NK, student_N = given.student_logp_NK, given.student_logp_N
    gap_NK = student_NK - given.teacher_logp_NK
    if differentiated:
        head_N = (student_NK.exp() * gap_NK).sum(1)
    else:
        head_N = ((student_NK.exp() * gap_NK).detach() * student_NK).sum(1)
    signal_N = plus_one + (student_N - given.teacher_logp_N).detach()
    ratio_N = (student_N.detach() - given.behaviour_logp_N).exp() if with_ratio else 1
    outside_N = ~torch.isin(given.targets_N, given.candidate_ids_NK[0])
    return head_N + outside_N * ratio_N * signal_N * student_N


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (dict(differentiated=True, plus_one=1, with_ratio=True), TRUE),  # (i)
        (dict(differentiated=False, plus_one=0, with_ratio=True), TRUE),  # (ii), ours
        (dict(differentiated=True, plus_one=1, with_ratio=False), FORM_I_WITHOUT_RATIO),
        (dict(differentiated=False, plus_one=0, with_ratio=False), None),
        (dict(differentiated=True, plus_one=0, with_ratio=True), MIXED),
    ],
    ids=str,
)
def test_both_forms_are_exact_with_the_ratio_and_biased_without(pieces, expected):
    given, logits = of_k([0, 2])
    found = expected_gradient(form(given, **pieces), logits)
    if expected is None:
        assert max(abs(x - y) for x, y in zip(found, TRUE, strict=True)) > 0.01
    else:
        assert found == pytest.approx(expected, abs=1e-6)


def test_without_its_ratio_our_form_is_biased_too():
    given, logits = of_k([0, 2])
    head = given.student_logp_NK, given.teacher_logp_NK
    loss_N, _ = divergences.head_and_tail(
        head,
        (given.student_logp_N, given.teacher_logp_N),
        given.outside_N,
        torch.ones(4).double(),
        at_most=None,
    )
    found = expected_gradient(loss_N, logits)
    assert max(abs(x - y) for x, y in zip(found, TRUE, strict=True)) > 0.01


def test_only_tokens_outside_the_candidates_have_a_tail_and_its_ratio():
    given, _ = of_k([0, 2])
    result = TopkKl(k=2, rest="sampled").token_loss(given)
    rho = (STUDENT.log_softmax(0) - OLD.log_softmax(0)).exp().tolist()
    assert given.outside_N.tolist() == [False, True, False, True]
    assert result.ratio.tolist() == pytest.approx([1, rho[1], 1, rho[3]])
    assert result.added_N.tolist() == [0, 1, 0, 1]
    # ρ (1 - A) of form (i) is this plus ρ
    minus_a = (STUDENT.log_softmax(0) - TEACHER.log_softmax(0)).tolist()
    assert [rho[y] * (1 + minus_a[y]) for y in (1, 3)] == pytest.approx(
        [0.871054, 0.059437], abs=1e-6
    )


def test_the_prefix_multiplies_both_parts():
    given = replace(
        batch([-1.0] * 3, [-2.0] * 3, behaviour=[-1.5, -1.2, -0.7]),
        targets_N=torch.tensor([0, 5, 0]),
        candidate_ids_NK=torch.tensor([[0], [0], [0]]),
        student_logp_NK=torch.tensor([[-0.5]] * 3).double(),
        teacher_logp_NK=torch.tensor([[-0.9]] * 3).double(),
    )
    free = TopkKl(k=1, rest="sampled").token_loss(given)
    tied = TopkKl(k=1, rest="sampled", prefix=PrefixRatio()).token_loss(given)
    before = torch.tensor([0.0, 0.5, 0.7]).double().exp()
    torch.testing.assert_close(tied.loss_N, before * free.loss_N)
    torch.testing.assert_close(tied.ratio, before * free.ratio)
    torch.testing.assert_close(tied.added_N, before * free.added_N)


def test_where_no_token_is_a_candidate_and_these_say_nothing_it_is_opd():
    given = replace(
        ragged(2),
        targets_N=torch.ones(sum(LENGTHS), dtype=torch.int64),
        candidate_ids_NK=torch.zeros(sum(LENGTHS), 1, dtype=torch.int64),
        student_logp_NK=torch.full((sum(LENGTHS), 1), -2.0).double(),
        teacher_logp_NK=torch.full((sum(LENGTHS), 1), -2.0).double(),
    )
    torch.testing.assert_close(
        TopkKl(k=1, rest="sampled").loss(given).loss_N, Opd().loss(given).loss_N
    )


def test_under_a_bound_it_is_the_mean_of_opd_under_the_same_bound():
    given, logits = of_k([0, 2])
    loss_N = TopkKl(k=2, rest="sampled", signal_at_most=0.5).loss(given).loss_N
    found = expected_gradient(loss_N, logits)
    other = STUDENT.clone().requires_grad_()
    opd_N = Opd(signal_at_most=0.5).loss(of_actions(other)).loss_N
    assert found == pytest.approx(expected_gradient(opd_N, other), abs=1e-9)


def test_it_is_of_the_reverse_kl_alone():
    with pytest.raises(ValueError, match="rest = 'sampled': must be of divergence = 'reverse'"):
        TopkKl(k=2, rest="sampled", divergence="forward")
    assert TopkKl(k=1, rest="sampled").requirements().tail is False
