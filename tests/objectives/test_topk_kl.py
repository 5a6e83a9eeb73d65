import msgspec
import pytest
import torch

from async_opd.objectives.base import TokenBatch
from async_opd.objectives.topk_kl import TopkKl
from async_opd.wire import Needs


def batch(student, teacher):
    """One position with candidates of these probabilities."""
    one = torch.tensor([-1.0])
    return TokenBatch(
        student_logp_N=one,
        behaviour_logp_N=one,
        teacher_logp_N=one,
        segment_N=torch.tensor([0]),
        reward_S=one,
        student_logp_NK=torch.tensor([student]).log(),
        teacher_logp_NK=torch.tensor([teacher]).log(),
    )


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("forward", 0.325336),  # .5 ln(.5/.25) + .125 ln(.125/.5) + .375 ln(.375/.25)
        ("reverse", 0.418494),  # .25 ln(.25/.5) + .5 ln(.5/.125) + .25 ln(.25/.375)
        (
            "jensen_shannon",
            0.087763,
        ),  # half of .5 ln 4/3 + .125 ln .4 + .375 ln 1.2 + .25 ln 2/3 + .5 ln 1.6 + .25 ln .8
    ],
)
def test_the_rest_of_the_vocabulary_is_one_more_outcome(divergence, expected):
    result = TopkKl(k=2, divergence=divergence).loss(batch(student=[0.25, 0.5], teacher=[0.5, 0.125]))
    torch.testing.assert_close(result.loss_N, torch.tensor([expected]), atol=1e-6, rtol=0)
    assert result.weight_N.tolist() == [1.0]


def test_the_teacher_is_asked_for_k_candidates():
    assert TopkKl(k=5).needs() == Needs(teacher_topk=5)


def test_no_candidates_at_all_are_refused():
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.convert({"k": 0, "tag": "topk_kl"}, TopkKl)
