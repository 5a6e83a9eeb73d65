import pytest
from batches import REFERENCE, STUDENT, TEACHER, batch, coefficients, ragged, rows

from async_opd.objectives.g_opd import GOpd


def test_the_advantage_extrapolates_by_the_published_numbers():
    result = GOpd().loss(batch(STUDENT, TEACHER, reference_logp_N=REFERENCE))
    assert result.advantage.tolist() == pytest.approx(
        [-0.0575, 0.6, -3.6875, -0.675, 0.025, 0.0125]
    )


@pytest.mark.parametrize("lam", [0.5, 1.25, 2.0])
@pytest.mark.parametrize("signal", ["live", "cached"])
def test_the_gradient_is_that_of_a_loop_below_and_above_one(lam, signal):
    """The log-ratio of teacher and reference weighs λ against the student's own, as in the code of
    the paper."""
    given, expected = ragged(1), []
    for tokens in rows(
        given, "student_logp_N", "behaviour_logp_N", "teacher_logp_N", "reference_logp_N"
    ):
        for new, old, teacher, reference in tokens:
            reverse_kl = (
                (old if signal == "cached" else new) - reference - (teacher - reference) * lam
            )
            expected.append(2.718281828459045 ** (new - old) * -reverse_kl)
    assert coefficients(GOpd(lam=lam, student_signal=signal), given) == pytest.approx(expected)


def test_a_reference_is_asked_for_only_where_it_matters():
    assert GOpd().needs().reference and not GOpd(lam=1.0).needs().reference
    result = GOpd(lam=1.0).loss(batch(STUDENT, TEACHER))  # without one
    assert result.advantage.tolist() == pytest.approx([-0.05, 0.5, -3.0, -0.5, 0.0, 0.01])


def test_where_the_student_is_the_teacher_it_goes_on_away_from_the_reference():
    given = batch([-1.0, -1.0], [-1.0, -1.0], reference_logp_N=[-1.4, -0.8])
    # a quarter of .4, of -.2
    assert coefficients(GOpd(lam=1.25), given) == pytest.approx([0.1, -0.05])
    assert coefficients(GOpd(lam=1.0), given) == [0.0, 0.0]
