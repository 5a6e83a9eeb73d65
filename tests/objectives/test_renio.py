"""ReNIO's weight: published numbers, mean one over the step's responses, what it shows."""

from math import exp, isnan

import pytest
from batches import batch, with_statistics

from async_opd.objectives.opd import Opd
from async_opd.objectives.renio import Renio

EXCESS = [
    [0.05, -0.5, 3.0, 0.5, 0.0, -0.01],
    [0.9, 1.5, 0.1, 4.2],
    [0.2, -0.3, 0.1, 0.5],
]
LENGTHS = [6, 4, 4]


def three(**more):
    flat = [x for response in EXCESS for x in response]
    return batch([-1.0] * 14, [-1.0 - x for x in flat], lengths=LENGTHS, **more)


@pytest.mark.parametrize(
    ("settings", "before", "expected"),
    [
        ({}, [20.085537, 6.049647, 1], [2.220608, 0.668834, 0.110558]),
        (dict(tau=1.0, clip=2.0), [7.389056, 5.754603, 1], [1.567287, 1.220604, 0.212109]),
    ],
)
def test_the_weights_are_those_of_the_reference(settings, before, expected):
    objective, given = Renio(**settings), three()
    found = objective.trajectory_statistics(given)["renio"].tolist()
    assert found == pytest.approx(before, abs=1e-6)
    result = objective.loss(with_statistics(objective, given))
    each = [w for w, n in zip(expected, LENGTHS, strict=True) for _ in range(n)]
    assert result.weight_N.tolist() == pytest.approx(each, abs=1e-6)
    assert sum(expected) / 3 == pytest.approx(1, abs=1e-6)


def test_a_response_that_left_the_loss_is_not_in_the_mean_and_masked_tokens_stay_in_k():
    # the second response is gone; of the first only its key token is masked
    kept = [True, True, False, True, True, True, *[False] * 4, *[True] * 4]
    objective, given = Renio(), three()
    result = objective.loss(with_statistics(objective, given, kept))
    mean = (exp(3) + 1) / 2
    assert result.weight_N[0].item() == pytest.approx(exp(3) / mean)
    assert result.weight_N[-1].item() == pytest.approx(1 / mean)


def test_it_shows_responses_without_a_key_token_and_the_weight_of_stale_ones():
    objective, lag = Renio(), [0] * 6 + [2] * 4 + [0] * 4
    given = with_statistics(objective, three(lag=lag))
    metrics = objective.loss(given).metrics
    assert metrics["no_key"].tolist() == [0] * 10 + [1] * 4
    stale = metrics["weight_stale"].tolist()
    assert [isnan(x) for x in stale] == [x == 0 for x in lag]
    assert stale[6:10] == pytest.approx([0.668834] * 4, abs=1e-6)


def test_one_key_token_at_the_clip_gives_the_largest_weight_and_the_number_of_them_plays_no_part():
    one = batch([-1.0] * 3, [-1.0, -9.0, -1.0])
    three_ = batch([-1.0] * 3, [-9.0, -9.0, -9.0])
    weights = [Renio().trajectory_statistics(given)["renio"].item() for given in (one, three_)]
    assert weights == pytest.approx([exp(3.0)] * 2)


def test_the_bound_on_the_signal_bounds_the_sizes_it_reads():
    found = Renio(signal_at_most=1.5).trajectory_statistics(three())["renio"].tolist()
    assert found == pytest.approx([exp(1.5), exp((0.9 + 1.5 + 1.5) / 3), 1.0])


def test_cached_signals_need_no_first_pass_and_alike_responses_are_opd():
    assert Renio().needs().first_pass
    assert not Renio(student_signal="cached").needs().first_pass
    given = batch([-1.0] * 4, [-1.2, -0.9, -1.1, -1.0], lengths=[2, 2], behaviour=[-1.1] * 4)
    objective = Renio()
    found = objective.loss(with_statistics(objective, given)).loss_N.tolist()
    assert found == pytest.approx(Opd().loss(given).loss_N.tolist())
    assert objective.mean_over == "sequences"


def test_a_clip_below_the_threshold_is_refused():
    with pytest.raises(ValueError, match=r"clip = 0\.5: must be > tau = 0\.8"):
        Renio(clip=0.5)
