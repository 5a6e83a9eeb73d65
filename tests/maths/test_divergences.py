import numpy as np
import pytest
import torch

from async_opd.maths.divergences import jensen_shannon, kl, outcomes, with_tail

FORMULAS = {  # of two probabilities of one outcome, student p and teacher q
    "forward": lambda p, q: q * np.log(q / p),
    "reverse": lambda p, q: p * np.log(p / q),
    "jensen_shannon": lambda p, q: (
        0.3 * q * np.log(q / (0.3 * q + 0.7 * p)) + 0.7 * p * np.log(p / (0.3 * q + 0.7 * p))
    ),
}
DIVERGENCES = {
    "forward": lambda student, teacher: kl(with_tail(teacher), with_tail(student)),
    "reverse": lambda student, teacher: kl(with_tail(student), with_tail(teacher)),
    "jensen_shannon": lambda student, teacher: jensen_shannon(with_tail(student), with_tail(teacher), beta=0.3),
}
each = pytest.mark.parametrize("name", DIVERGENCES)


N, V = 6, 9


def logits(seed):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 2


def by_loop(name, student_NK, teacher_NK):
    """Sum of the formula over candidates and rest, float64, one outcome at a time."""
    total_N = []
    for p_K, q_K in zip(student_NK.double().exp().numpy(), teacher_NK.double().exp().numpy(), strict=True):
        rest = [] if len(p_K) == V else [(1 - p_K.sum(), 1 - q_K.sum())]
        total_N.append(sum(FORMULAS[name](p, q) for p, q in [*zip(p_K, q_K, strict=True), *rest]))
    return torch.tensor(total_N)


@each
def test_over_candidates_and_rest_equals_a_loop(name):
    student_NK, teacher_NK = (logits(seed).log_softmax(-1)[:, :4] for seed in (0, 1))
    got_N = DIVERGENCES[name](student_NK, teacher_NK).double()
    torch.testing.assert_close(got_N, by_loop(name, student_NK, teacher_NK), atol=1e-5, rtol=1e-5)


@each
def test_all_of_the_vocabulary_as_candidates_is_the_exact_divergence(name):
    student_NV, teacher_NV = (logits(seed).log_softmax(-1) for seed in (0, 1))
    got_N = DIVERGENCES[name](student_NV, teacher_NV).double()
    torch.testing.assert_close(got_N, by_loop(name, student_NV, teacher_NV), atol=1e-6, rtol=0)


@each
def test_all_of_the_vocabulary_as_candidates_has_the_exact_gradient(name):
    student, teacher_NV = logits(0).requires_grad_(), logits(1).log_softmax(-1)
    DIVERGENCES[name](student.log_softmax(-1), teacher_NV).sum().backward()
    exact = logits(0).double().requires_grad_()
    p, q = exact.softmax(-1), teacher_NV.double().exp()
    mixed = 0.3 * q + 0.7 * p
    {
        "forward": q * (q / p).log(),
        "reverse": p * (p / q).log(),
        "jensen_shannon": 0.3 * q * (q / mixed).log() + 0.7 * p * (p / mixed).log(),
    }[name].sum().backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-6, rtol=0)


@each
def test_is_zero_where_student_and_teacher_agree(name):
    logp_NK = logits(0).log_softmax(-1)[:, :4]
    torch.testing.assert_close(DIVERGENCES[name](logp_NK, logp_NK), torch.zeros(6), atol=1e-6, rtol=0)


@each
def test_fewer_candidates_never_give_more_than_the_exact_divergence(name):
    student_NV, teacher_NV = (logits(seed).log_softmax(-1) for seed in (0, 1))
    order_NV = teacher_NV.argsort(-1, descending=True)
    student_NV, teacher_NV = student_NV.gather(-1, order_NV), teacher_NV.gather(-1, order_NV)
    by_k = torch.stack([DIVERGENCES[name](student_NV[:, :k], teacher_NV[:, :k]) for k in range(1, 10)])
    assert (by_k.diff(dim=0) >= -1e-5).all()  # merging outcomes loses divergence, so each more candidate adds some


@each
@pytest.mark.parametrize("outside", [0.0, 1e-9, 1e-6, 1e-3])
def test_gradients_are_finite_when_the_rest_vanishes(name, outside):
    student_NK = torch.tensor([[1 - outside, 1e-30]]).log().requires_grad_()
    teacher_NK = torch.tensor([[0.5, 0.5]]).log()
    loss_N = DIVERGENCES[name](student_NK, teacher_NK)
    loss_N.sum().backward()
    assert loss_N.isfinite().all() and student_NK.grad.isfinite().all()


def test_rounding_above_one_leaves_a_finite_rest():
    logp_NK = torch.tensor([[0.75, 0.2500001]]).log()
    torch.testing.assert_close(with_tail(logp_NK)[0, 2], torch.tensor(-13.815511))  # log 1e-6


def test_kl_of_a_fair_and_a_loaded_coin():
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(kl(fair, loaded), torch.tensor([0.143841]))  # .5 log 2 + .5 log 2/3
    torch.testing.assert_close(kl(loaded, fair), torch.tensor([0.130812]))  # .25 log 1/2 + .75 log 3/2


def test_forward_weighs_by_the_teacher_and_reverse_by_the_student():
    student, teacher = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    torch.testing.assert_close(
        DIVERGENCES["forward"](student, teacher), torch.tensor([0.130812])
    )  # .25 log 1/2 + .75 log 3/2
    torch.testing.assert_close(
        DIVERGENCES["reverse"](student, teacher), torch.tensor([0.143841])
    )  # .5 log 2 + .5 log 2/3


def test_beta_is_the_share_of_the_teacher_in_the_mixture():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    near_student = jensen_shannon(student, teacher, beta=1e-4) / 1e-4  # towards KL(teacher‖student)
    near_teacher = jensen_shannon(student, teacher, beta=1 - 1e-4) / 1e-4  # towards KL(student‖teacher)
    torch.testing.assert_close(near_student, kl(teacher, student), atol=2e-3, rtol=0)
    torch.testing.assert_close(near_teacher, kl(student, teacher), atol=2e-3, rtol=0)


def test_what_is_outside_is_a_bucket_or_left_out():
    half = torch.tensor([[0.5, 0.125]]).log()
    torch.testing.assert_close(outcomes(half, rest="bucket").exp(), torch.tensor([[0.5, 0.125, 0.375]]))
    torch.testing.assert_close(outcomes(half, rest="renormalise").exp(), torch.tensor([[0.8, 0.2]]))
    torch.testing.assert_close(outcomes(half, rest="drop"), half)
