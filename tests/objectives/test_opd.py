import torch

from async_opd.objectives.base import TokenBatch
from async_opd.objectives.opd import Opd

STUDENT = [0.3, -0.2, 0.5, -1.0]  # logits over four actions
OLD = [0.8, 0.1, -0.4, -0.6]
TEACHER = [1.0, 0.0, -0.5, 0.2]
FINITE_DIFFERENCES = [-0.233373, -0.043735, 0.384659, -0.107552]  # of KL(π‖π_T) in the student's logits
WITHOUT_RATIO = [-0.170218, 0.040712, 0.230898, -0.101393]


def expected_gradient(behaviour_logp_N):
    """Expectation of the gradient of `opd` over all four actions, each sampled under the old policy."""
    logits = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    zero_N = torch.zeros(4)
    result = Opd().loss(
        TokenBatch(
            student_logp_N=logits.log_softmax(0),
            behaviour_logp_N=behaviour_logp_N,
            teacher_logp_N=torch.tensor(TEACHER).double().log_softmax(0),
            segment_N=zero_N.long(),
            reward_S=zero_N[:1],
        )
    )
    (torch.tensor(OLD).double().softmax(0) * result.loss_N).sum().backward()
    return logits.grad


def test_the_expected_gradient_of_opd_on_stale_samples_is_that_of_the_kl():
    gradient = expected_gradient(torch.tensor(OLD).double().log_softmax(0))
    torch.testing.assert_close(gradient, torch.tensor(FINITE_DIFFERENCES).double(), atol=1e-5, rtol=0)


def test_without_the_ratio_it_is_not():
    gradient = expected_gradient(torch.tensor(STUDENT).double().log_softmax(0))
    torch.testing.assert_close(gradient, torch.tensor(WITHOUT_RATIO).double(), atol=1e-5, rtol=0)


def test_finite_differences_of_the_kl_are_the_literal_numbers():
    def kl(logits):
        p, q = logits.softmax(0), torch.tensor(TEACHER).double().softmax(0)
        return (p * (p / q).log()).sum()

    at, steps = torch.tensor(STUDENT).double(), 1e-5 * torch.eye(4, dtype=torch.float64)
    slopes = torch.stack([(kl(at + step) - kl(at - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(slopes, torch.tensor(FINITE_DIFFERENCES).double(), atol=1e-5, rtol=0)


def test_loss_and_weight_are_the_formula():
    student, behaviour = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.2]).log()
    batch = TokenBatch(
        student_logp_N=student,
        behaviour_logp_N=behaviour,
        teacher_logp_N=student + torch.tensor([0.3, -0.4]),
        segment_N=torch.tensor([0, 0]),
        reward_S=torch.tensor([1.0]),
    )
    plain, truncated = Opd().loss(batch), Opd(truncate=1.5).loss(batch)
    torch.testing.assert_close(plain.weight_N, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(plain.loss_N, torch.tensor([0.415888, -0.460517]))  # -2 · .3 · ln .5, -.5 · -.4 · ln .1
    torch.testing.assert_close(truncated.weight_N, torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(truncated.loss_N[0], torch.tensor(0.311916))  # -1.5 · .3 · ln .5
