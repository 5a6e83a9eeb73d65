from dataclasses import replace
from math import exp

import pytest
import torch
from batches import LENGTHS, batch, ragged

from async_opd.core.wire import Needs
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.sampled import Importance, Ppo

FACTORS = {
    Importance(): lambda rho, a: rho,
    Importance(ratio="none"): lambda rho, a: 1.0,
    Importance(at_most=1.2): lambda rho, a: min(rho, 1.2),
    Importance(between=(0.5, 2.0)): lambda rho, a: rho if 0.5 <= rho <= 2 else 0.0,
    Ppo(): lambda rho, a: 0.0 if (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8) else rho,
}
M = 4


def with_samples(seed):
    """A ragged batch with three samples beside each token; the first of them repeats the token
    itself."""
    given, generator = ragged(seed), torch.Generator().manual_seed(seed)
    extra = []
    for name in ("student", "behaviour", "teacher"):
        own_N1 = getattr(given, f"{name}_logp_N").detach()[:, None]
        other_NK = -3 * torch.rand(sum(LENGTHS), M - 2, generator=generator).double() - 0.01
        extra.append(torch.cat([own_N1, other_NK], 1))
    columns = zip(("student", "behaviour", "teacher"), extra, strict=True)
    given = replace(given, **{f"{name}_logp_NK": x for name, x in columns})
    return replace(given, student_logp_NK=given.student_logp_NK.requires_grad_())


@pytest.mark.parametrize("correction", FACTORS, ids=str)
@pytest.mark.parametrize("signal", ["live", "cached"])
def test_each_sample_gets_its_own_ratio_and_advantage_over_m(correction, signal):
    given = with_samples(1)
    result = McOpd(m=M, correction=correction, student_signal=signal).loss(given)
    got = torch.autograd.grad(-result.loss_N.sum(), (given.student_logp_N, given.student_logp_NK))
    names = ("student", "behaviour", "teacher")
    pairs = [
        torch.cat([getattr(given, f"{n}_logp_N")[:, None], getattr(given, f"{n}_logp_NK")], 1)
        for n in names
    ]
    expected_NM = []
    for row in zip(*(x.tolist() for x in pairs), strict=True):
        expected_NM.append([])
        for new, old, teacher in zip(*row, strict=True):
            a = teacher - (old if signal == "cached" else new)
            expected_NM[-1].append(FACTORS[correction](exp(new - old), a) * a / M)
    torch.testing.assert_close(
        torch.cat([got[0][:, None], got[1]], 1), torch.tensor(expected_NM).double()
    )
    assert result.advantage.shape == result.ratio.shape == (sum(LENGTHS), M)


@pytest.mark.parametrize("ratio", ["sequence", "geometric"])
def test_a_sample_stands_for_its_token_in_the_ratio_of_the_trajectory(ratio):
    given, expected_NM = with_samples(2), []
    gap_N = (given.student_logp_N - given.behaviour_logp_N).tolist()
    other_NK = (given.student_logp_NK - given.behaviour_logp_NK).tolist()
    for n, segment in enumerate(given.segment_N.tolist()):
        mine = [i for i, s in enumerate(given.segment_N.tolist()) if s == segment]
        for other in [gap_N[n], *other_NK[n]]:
            total = sum(other if i == n else gap_N[i] for i in mine)
            expected_NM.append(exp(total if ratio == "sequence" else total / len(mine)))
    result = McOpd(m=M, correction=Importance(ratio=ratio)).loss(given)
    assert result.ratio.flatten().tolist() == pytest.approx(expected_NM)


def test_the_ratio_of_a_trajectory_is_clamped_after_a_sample_has_taken_the_place_of_its_token():
    given = batch([-1.0, -1.0], [-1.0, -1.0], behaviour=[-21.0, -11.0])  # log ρ 20 and 10
    one_NK = -torch.ones(2, 1).double()
    behaviour_NK = torch.tensor([[-6.0], [-1.0]]).double()  # log ρ 5 and 0
    given = replace(
        given, student_logp_NK=one_NK, behaviour_logp_NK=behaviour_NK, teacher_logp_NK=one_NK
    )
    result = McOpd(m=2, correction=Importance(ratio="sequence")).loss(given)
    e10, e15, e20 = 22026.465795, 3269017.372472, 485165195.409790
    # of the tokens themselves 20 + 10 nats, more than the bound of 20; of the samples 5 + 10 and 20
    # + 0
    assert result.ratio.tolist() == [pytest.approx([e20, e15]), pytest.approx([e20, e20])]
    geometric = McOpd(m=2, correction=Importance(ratio="geometric")).loss(given).ratio
    # e^7.5
    assert geometric.tolist() == [pytest.approx([e15, 1808.042414]), pytest.approx([e15, e10])]


def test_one_less_than_m_samples_of_the_behaviour_policy_are_asked_for():
    assert McOpd(m=4).needs() == Needs(teacher_at_student_ids=3, student_ids="sampled")
    assert McOpd(m=1).needs().teacher_at_student_ids == 0
