from math import exp

import pytest
import torch
from batches import (
    KEPT,
    LENGTHS,
    STUDENT,
    TEACHER,
    batch,
    coefficients,
    ragged,
    rows,
    with_statistics,
)

from async_opd.objectives.modifiers import DriftGate, Position, PrefixRatio, RandomShare
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance, Ppo

# the factor that multiplies A, of the ratios of a trajectory, of the t-th token and its advantage
CORRECTIONS = {
    Importance(): lambda rho, t, a: rho[t],
    Importance(ratio="none"): lambda rho, t, a: 1.0,
    Importance(at_most=1.5): lambda rho, t, a: min(rho[t], 1.5),
    Importance(between=(0.5, 2.0)): lambda rho, t, a: rho[t] if 0.5 <= rho[t] <= 2 else 0.0,
    Importance(at_most=1.5, between=(0.5, 2.0)): lambda rho, t, a: (
        min(rho[t], 1.5) if 0.5 <= rho[t] <= 2 else 0.0
    ),
    Importance(ratio="sequence"): lambda rho, t, a: product(rho),
    Importance(ratio="sequence", at_most=2.0): lambda rho, t, a: min(product(rho), 2.0),
    Importance(ratio="geometric"): lambda rho, t, a: product(rho) ** (1 / len(rho)),
    Ppo(): lambda rho, t, a: (
        0.0 if (a > 0 and rho[t] > 1.2) or (a < 0 and rho[t] < 0.8) else rho[t]
    ),
    Ppo(clip=0.4, dual_clip=3.0): lambda rho, t, a: (
        0.0 if (a > 0 and rho[t] > 1.4) or (a < 0 and (rho[t] < 0.6 or rho[t] > 3)) else rho[t]
    ),
}


def product(values):
    result = 1.0
    for value in values:
        result *= value
    return result


def test_the_advantage_is_what_the_teacher_likes_a_token_more():
    result = Opd().loss(batch(STUDENT, TEACHER))
    assert result.advantage.tolist() == pytest.approx([-0.05, 0.5, -3.0, -0.5, 0.0, 0.01])
    assert result.weight_N.tolist() == result.ratio.tolist() == [1.0] * 6
    assert result.selected_N.all()


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_is_ratio_times_advantage_by_each_correction(correction, seed):
    given, expected = ragged(seed), []
    for tokens in rows(given, "student_logp_N", "behaviour_logp_N", "teacher_logp_N"):
        rho = [exp(new - old) for new, old, _ in tokens]
        for t, (new, _, teacher) in enumerate(tokens):
            expected.append(CORRECTIONS[correction](rho, t, teacher - new) * (teacher - new))
    assert coefficients(Opd(correction=correction), given) == pytest.approx(expected)


def test_loss_and_ratio_are_the_formula():
    # ρ 2, .5
    given = batch(
        [-0.6931472, -2.3025851], [-0.3931472, -2.7025851], behaviour=[-1.3862944, -1.6094379]
    )
    plain, truncated = (Opd(correction=Importance(at_most=c)).loss(given) for c in (None, 1.5))
    assert plain.ratio.tolist() == pytest.approx([2.0, 0.5])
    # -2 · .3 · ln .5, -.5 · -.4 · ln .1
    assert plain.loss_N.tolist() == pytest.approx([0.415888, -0.460517])
    assert truncated.ratio.tolist() == pytest.approx([1.5, 0.5])
    assert truncated.loss_N[0].item() == pytest.approx(0.311916)  # -1.5 · .3 · ln .5


def test_beyond_a_truncation_the_gradient_stays_and_beyond_a_clip_it_does_not():
    given = batch([-1.0], [-0.5], behaviour=[-3.0])  # ρ = e², A = .5
    assert coefficients(Opd(correction=Importance(at_most=1.2)), given) == pytest.approx([0.6])
    assert coefficients(Opd(correction=Ppo(clip=0.2)), given) == [0.0]


def test_the_loss_of_ppo_is_the_negative_of_the_printed_minimum():
    student, old = [-1.0, -1.0, -1.0, -1.0], [-2.0, -2.0, -0.2, -3.0]  # ρ: e, e, e^-.8, e²
    given = batch(student, [-0.5, -1.5, -1.5, -1.5], behaviour=old)  # A: .5, -.5, -.5, -.5
    result = Opd(correction=Ppo(dual_clip=3.0)).loss(given)
    # -1.2 · .5; -min(e · -.5, 1.2 · -.5) = .5 e; -min(e^-.8 · -.5, .8 · -.5) = .8 · .5; e² is over
    # 3: 3 · .5
    assert result.loss_N.tolist() == pytest.approx([-0.6, 1.359141, 0.4, 1.5], abs=1e-6)
    assert result.ratio.tolist() == pytest.approx([1.2, 2.718282, 0.8, 3.0], abs=1e-6)


def test_cached_signals_take_the_advantage_of_the_behaviour_policy():
    given = batch([-1.0, -0.2], [-0.5, -0.4], behaviour=[-2.0, -0.2])
    result = Opd(student_signal="cached").loss(given)
    assert result.advantage.tolist() == pytest.approx([1.5, -0.2])  # -.5 + 2, -.4 + .2
    assert coefficients(Opd(student_signal="cached"), given) == pytest.approx(
        [2.718282 * 1.5, -0.2], abs=1e-6
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Importance(ratio="none", at_most=2.0),
            r"at_most = 2\.0: has no effect with ratio = 'none'",
        ),
        (
            lambda: Importance(ratio="none", between=(1.0, 2.0)),
            r"between = .* has no effect with ratio = 'none'",
        ),
        (
            lambda: Importance(at_most=2.0, between=(1.0, 2.0)),
            r"at_most = 2\.0: has no effect with between = \[1\.0, 2\.0",
        ),
        (
            lambda: PrefixRatio(at_most=3.0, between=(1.0, 2.0)),
            r"at_most = 3\.0: has no effect with between",
        ),
        (
            lambda: Position(share=1.0, part="suffix"),
            "part = 'suffix': has no effect with share = 1",
        ),
        (
            lambda: Opd(mean_over="selected"),
            "mean_over = 'selected': has no effect without position or random",
        ),
    ],
)
def test_settings_without_effect_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- weights and masks that compose
# ---------------------------------------------------------------------------------


def test_the_drift_gate_weighs_blocks_by_the_published_numbers():
    drift = [0.02, -0.04, 0.30, 0.10, -0.50, -0.30]
    given = batch(STUDENT, TEACHER, behaviour=[s - d for s, d in zip(STUDENT, drift, strict=True)])
    objective = Opd(drift_gate=DriftGate(block=2))
    result = objective.loss(with_statistics(objective, given))
    expected = [1.198075, 1.198075, 0.990759, 0.990759, 0.811165, 0.811165]
    # the published ones are without the 1e-6
    assert result.weight_N.tolist() == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize(("block", "tau"), [(1, 1.0), (3, 0.5), (64, 2.0)])
def test_the_drift_gate_is_that_of_a_loop_over_blocks_of_each_trajectory(block, tau):
    given, gates = ragged(0), []
    for tokens in rows(given, "student_logp_N", "behaviour_logp_N"):
        drift = [new - old for new, old in tokens]
        for t in range(len(drift)):
            inside = drift[t // block * block : t // block * block + block]
            gates.append(exp(-tau * abs(sum(inside) / len(inside))))
    mean = sum(g for g, kept in zip(gates, KEPT, strict=True) if kept) / sum(KEPT)
    objective = Opd(drift_gate=DriftGate(block=block, tau=tau))
    result = objective.loss(with_statistics(objective, given, KEPT))
    assert result.weight_N.tolist() == pytest.approx([g / (mean + 1e-6) for g in gates])


@pytest.mark.parametrize(
    ("share", "part", "expected"),  # of 5, 1, 7, 3 and 2 tokens
    [
        # 1.5 → 2, .3 → 1, 2.1 → 3, .9 → 1, .6 → 1
        (0.3, "prefix", ["11000", "1", "1110000", "100", "10"]),
        (0.3, "suffix", ["00011", "1", "0000111", "001", "01"]),
        # 2.5 → 3, .5 → 1, 3.5 → 4, 1.5 → 2, 1
        (0.5, "prefix", ["11100", "1", "1111000", "110", "10"]),
        (0.01, "suffix", ["00001", "1", "0000001", "001", "01"]),
        (1.0, "prefix", ["11111", "1", "1111111", "111", "11"]),
    ],
)
def test_position_selects_a_share_of_each_response_from_its_start_or_end(share, part, expected):
    result = Opd(position=Position(share=share, part=part)).loss(ragged(0))
    assert "".join(str(int(x)) for x in result.selected_N) == "".join(expected)
    assert result.loss_N.bool().tolist() == result.selected_N.tolist()


@pytest.mark.parametrize(
    ("part", "expected"), [("prefix", [0, 1, 2, 3]), ("suffix", [7, 8, 9, 10])]
)
def test_position_takes_the_ceiling_of_its_share_as_the_papers_code_does(part, expected):
    # 3.3 of them
    result = Opd(position=Position(share=0.3, part=part)).loss(batch([-1.0] * 11, [-2.0] * 11))
    assert result.selected_N.nonzero()[:, 0].tolist() == expected


def test_random_selects_as_many_of_each_response_wherever_it_is():
    given, objective = ragged(0), Opd(random=RandomShare(share=0.3))
    chosen = objective.loss(given).selected_N.split(LENGTHS)
    assert [part.sum().item() for part in chosen] == [2, 1, 2, 1, 1]


def test_masks_and_weights_multiply():
    given = ragged(0)
    both = Opd(position=Position(share=0.5), random=RandomShare(share=0.5), constant=2.5).loss(
        given
    )
    first, chance = (
        Opd(**{name: kind(share=0.5)}).loss(given)
        for name, kind in dict(position=Position, random=RandomShare).items()
    )
    assert both.selected_N.tolist() == (first.selected_N & chance.selected_N).tolist()
    assert both.weight_N.tolist() == [2.5] * sum(LENGTHS)
    torch.testing.assert_close(both.loss_N, 2.5 * Opd().loss(given).loss_N * both.selected_N)
