import pytest
from batches import REFERENCE, STUDENT, TEACHER, batch, ragged, rows

from async_opd.objectives.iw_opd import IwOpd


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        ("all", [1.5, 1.493842, 1.432266, 1.062808, 1.001232, 1.001232]),
        ("before_last", [1.5, 1.493827, 1.432099, 1.061728, 1.0, 1.0]),
    ],
)
def test_the_weight_is_the_published_one_by_the_sum_of_the_code_or_of_the_paper(total, expected):
    assert IwOpd(total=total).loss(batch(STUDENT, TEACHER)).weight_N.tolist() == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("total", ["all", "before_last"])
def test_the_weight_is_that_of_a_loop_over_each_trajectory(gamma, total):
    given, expected = ragged(2), []
    for tokens in rows(given, "student_logp_N", "teacher_logp_N"):
        sizes = [abs(teacher - student) for student, teacher in tokens]
        whole = sum(sizes if total == "all" else sizes[:-1])
        for t in range(len(sizes)):
            spent = sum(sizes[:t]) / (whole + 1e-8)
            expected.append(1 + gamma * min(max(1 - spent, 0.0), 1.0))
    assert IwOpd(gamma=gamma, total=total).loss(given).weight_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("total", ["all", "before_last"])
def test_a_single_token_and_agreement_everywhere_have_the_full_weight(total):
    given = batch([-1.0, -0.5, -0.2], [-2.0, -0.5, -0.2], lengths=[1, 2])
    assert IwOpd(total=total).loss(given).weight_N.tolist() == [1.5, 1.5, 1.5]


def test_the_weight_lies_between_one_and_one_plus_gamma_and_never_rises():
    given = ragged(3)
    for part_T in IwOpd().loss(given).weight_N.split([5, 1, 7, 3, 2]):
        assert part_T[0] == 1.5 and part_T.min() >= 1 and (part_T.diff() <= 0).all()


def test_on_top_of_g_opd_the_plain_discrepancy_weighs_the_extrapolated_advantage():
    given = batch(STUDENT, TEACHER, reference_logp_N=REFERENCE)
    result = IwOpd(lam=1.25).loss(given)
    assert result.advantage.tolist() == pytest.approx(
        [-0.0575, 0.6, -3.6875, -0.675, 0.025, 0.0125]
    )
    assert result.weight_N.tolist() == pytest.approx(
        [1.5, 1.493842, 1.432266, 1.062808, 1.001232, 1.001232], abs=1e-6
    )


def test_the_sum_of_no_discrepancy_is_refused():
    with pytest.raises(ValueError, match="total = 'before_last': has no effect with gamma = 0"):
        IwOpd(gamma=0.0, total="before_last")


def test_cached_signals_accumulate_what_the_behaviour_policy_disagreed_on():
    # |A| cached: 1, 0, 3
    given = batch([-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], behaviour=[-2.0, -1.0, -4.0])
    assert IwOpd(student_signal="cached").loss(given).weight_N.tolist() == pytest.approx(
        [1.5, 1.375, 1.375]
    )
    assert IwOpd().loss(given).weight_N.tolist() == [1.5] * 3
