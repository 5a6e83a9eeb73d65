import msgspec
import pytest
import torch

from async_opd.objectives.base import TokenBatch
from async_opd.objectives.topk_kl import TopkKl
from async_opd.wire import Needs


def batch(student, teacher):
    """One position with candidates of these probabilities."""
    one, student_NK, teacher_NK = torch.tensor([-1.0]), torch.tensor([student]).log(), torch.tensor([teacher]).log()
    return TokenBatch(
        student_logp_N=one,
        behaviour_logp_N=one,
        teacher_logp_N=one,
        segment_N=torch.tensor([0]),
        reward_S=one,
        student_logp_NK=student_NK,
        teacher_logp_NK=teacher_NK,
    )


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward", 0.143841),  # .5 ln(.5/.25) + .25 ln(.25/.5) + .25 ln(.25/.25) = .25 ln 2 = .173287
        ("reverse", 0.173287),
        ("jensen_shannon", 0.021),
    ],
)
def test_the_rest_of_the_vocabulary_is_one_more_outcome(divergence, expected):
    loss_N = TopkKl(k=2, divergence=divergence).loss(batch([0.25, 0.5], [0.5, 0.25])).loss_N
    print(loss_N)


def test_the_teacher_is_asked_for_k_candidates():
    assert TopkKl(k=5).needs() == Needs(teacher_topk=5)


def test_no_candidates_at_all_are_refused():
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.convert({"k": 0, "tag": "topk_kl"}, TopkKl)
