import numpy as np
import pytest

from async_opd.roles.teacher.candidates import tail_left_by


def test_the_tail_of_a_backend_without_one_is_what_its_candidates_leave():
    logp = np.log(np.array([[0.5, 0.25], [0.9, 0.0999]], np.float32))
    left = tail_left_by(logp)
    assert left.dtype == np.float32
    assert np.exp(left) == pytest.approx([0.25, 0.0001], abs=1e-7)


def test_what_is_left_by_rounding_alone_counts_as_the_floor():
    logp = np.array([[-1e-8, -20.0], [2e-7, -30.0]], np.float32)  # of 1 they leave 8e-9 and -2e-7
    assert tail_left_by(logp) == pytest.approx([-13.815511] * 2)  # log 1e-6
