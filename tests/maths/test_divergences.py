import numpy as np
import pytest
import torch

from async_opd.maths.divergences import jensen_shannon, kl, outcomes
from async_opd.maths.logprobs import NOTHING

FORMULAS = {  # of two probabilities of one outcome, student p and teacher q
    "forward": lambda p, q: q * np.log(q / p),
    "reverse": lambda p, q: p * np.log(p / q),
    "jensen_shannon": lambda p, q: (
        0.3 * q * np.log(q / (0.3 * q + 0.7 * p)) + 0.7 * p * np.log(p / (0.3 * q + 0.7 * p))
    ),
}
DIVERGENCES = {
    "forward": lambda student, teacher: kl(teacher, student),
    "reverse": kl,
    "jensen_shannon": lambda student, teacher: jensen_shannon(student, teacher, beta=0.3),
}
each = pytest.mark.parametrize("name", DIVERGENCES)


N, V = 6, 9


def logits(seed):
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed)) * 2


def merged(logp_NV, k):
    """The first k of the vocabulary, and all others as one outcome."""
    return outcomes(logp_NV[:, :k], logp_NV[:, k:].logsumexp(-1), rest="bucket")


def by_loop(name, student_NV, teacher_NV, k=V):
    """Sum of the formula over the first k and the sum of the others, float64, one outcome at a
    time."""
    total_N = []
    for p_V, q_V in zip(
        student_NV.double().exp().tolist(), teacher_NV.double().exp().tolist(), strict=True
    ):
        outcomes = [*zip(p_V[:k], q_V[:k], strict=True)]
        if k < V:
            outcomes.append((sum(p_V[k:]), sum(q_V[k:])))
        total_N.append(sum(FORMULAS[name](p, q) for p, q in outcomes))
    return torch.tensor(total_N, dtype=torch.float64)


@each
def test_over_candidates_and_rest_equals_a_loop(name):
    student_NV, teacher_NV = (logits(seed).log_softmax(-1) for seed in (0, 1))
    got_N = DIVERGENCES[name](merged(student_NV, 4), merged(teacher_NV, 4)).double()
    torch.testing.assert_close(
        got_N, by_loop(name, student_NV, teacher_NV, 4), atol=1e-6, rtol=1e-6
    )


@each
def test_all_of_the_vocabulary_as_candidates_is_the_exact_divergence(name):
    student_NV, teacher_NV = (logits(seed).log_softmax(-1) for seed in (0, 1))
    nothing_N = torch.full((N,), NOTHING)  # what is read of the tail then
    parts = [outcomes(logp_NV, nothing_N, rest="bucket") for logp_NV in (student_NV, teacher_NV)]
    got_N = DIVERGENCES[name](*parts).double()
    torch.testing.assert_close(got_N, by_loop(name, student_NV, teacher_NV), atol=1e-6, rtol=0)


@each
def test_all_of_the_vocabulary_as_candidates_has_the_exact_gradient(name):
    student, teacher_NV = logits(0).requires_grad_(), logits(1).log_softmax(-1)
    nothing_N = torch.full((N,), NOTHING)
    parts = [
        outcomes(logp_NV, nothing_N, rest="bucket")
        for logp_NV in (student.log_softmax(-1), teacher_NV)
    ]
    DIVERGENCES[name](*parts).sum().backward()
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
    logp_NK = merged(logits(0).log_softmax(-1), 4)
    torch.testing.assert_close(
        DIVERGENCES[name](logp_NK, logp_NK), torch.zeros(N), atol=1e-6, rtol=0
    )


@each
def test_fewer_candidates_never_give_more_than_the_exact_divergence(name):
    student_NV, teacher_NV = (logits(seed).log_softmax(-1) for seed in (0, 1))
    order_NV = teacher_NV.argsort(-1, descending=True)
    student_NV, teacher_NV = student_NV.gather(-1, order_NV), teacher_NV.gather(-1, order_NV)
    by_k = torch.stack(
        [DIVERGENCES[name](merged(student_NV, k), merged(teacher_NV, k)) for k in range(1, V)]
    )
    # merging outcomes loses divergence, so each more candidate adds some
    assert (by_k.diff(dim=0) >= -1e-5).all()


@each
@pytest.mark.parametrize(
    ("student", "teacher"), [(NOTHING, NOTHING), (NOTHING, -3.0), (-20.0, -90.0), (-90.0, -0.1)]
)
def test_gradients_are_finite_when_a_tail_vanishes(name, student, teacher):
    parts = [torch.tensor([[-0.7, -0.7, tail]]).requires_grad_() for tail in (student, teacher)]
    loss_N = DIVERGENCES[name](*parts)
    loss_N.sum().backward()
    assert loss_N.isfinite().all() and parts[0].grad.isfinite().all()


def test_kl_of_a_fair_and_a_loaded_coin():
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(kl(fair, loaded), torch.tensor([0.143841]))  # .5 log 2 + .5 log 2/3
    # .25 log 1/2 + .75 log 3/2
    torch.testing.assert_close(kl(loaded, fair), torch.tensor([0.130812]))


def test_forward_weighs_by_the_teacher_and_reverse_by_the_student():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward, reverse = (
        DIVERGENCES[name](student, teacher).item() for name in ("forward", "reverse")
    )
    assert forward == pytest.approx(0.130812, abs=1e-6)  # .25 log 1/2 + .75 log 3/2
    assert reverse == pytest.approx(0.143841, abs=1e-6)  # .5 log 2 + .5 log 2/3


def test_beta_is_the_share_of_the_teacher_in_the_mixture():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    near_student = jensen_shannon(student, teacher, beta=1e-4) / 1e-4  # towards KL(teacher‖student)
    # towards KL(student‖teacher)
    near_teacher = jensen_shannon(student, teacher, beta=1 - 1e-4) / 1e-4
    torch.testing.assert_close(near_student, kl(teacher, student), atol=2e-3, rtol=0)
    torch.testing.assert_close(near_teacher, kl(student, teacher), atol=2e-3, rtol=0)


def test_what_is_outside_is_a_bucket_or_left_out():
    half, tail = torch.tensor([[0.5, 0.125]]).log(), torch.tensor([0.375]).log()
    torch.testing.assert_close(
        outcomes(half, tail, rest="bucket").exp(), torch.tensor([[0.5, 0.125, 0.375]])
    )
    torch.testing.assert_close(
        outcomes(half, tail, rest="renormalise").exp(), torch.tensor([[0.8, 0.2]])
    )
    torch.testing.assert_close(outcomes(half, tail, rest="drop"), half)
