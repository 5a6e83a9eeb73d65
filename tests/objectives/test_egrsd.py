from dataclasses import replace
from math import exp, sqrt

import pytest
from batches import KEPT, NAN, STUDENT, TEACHER, batch, coefficients, ragged, rows, with_statistics

from async_opd.core.wire import Needs
from async_opd.maths.advantages import Moments
from async_opd.objectives.cl_egrsd import ClEgrsd
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.sampled import Importance

ENTROPY = [0.05, 2, 1.5, 0.1, 3, 2.8]
START = {"reward": Moments()}


def six(objective, reward):
    """The result on the six tokens of one right or wrong rollout in the first steps."""
    given = batch(STUDENT, TEACHER, teacher_entropy_N=ENTROPY, reward=[reward], running=START)
    return objective.loss(with_statistics(objective, given))


def test_the_gate_by_entropy_is_the_published_one():
    certainty_N = six(Egrsd(gamma=0.3), 1.0).metrics["certainty"]
    assert certainty_N.tolist() == pytest.approx([0.995, 0.8, 0.85, 0.99, 0.7, 0.72])
    steep = six(Egrsd(gamma=1.0), 1.0).metrics["certainty"]
    assert steep.tolist() == pytest.approx([0.983333, 0.333333, 0.5, 0.966667, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "expected"),  # A = +.5 and -.5
    [
        (1.0, [0.951229, 1.2, 0.8, 0.8, 1.0, 1.01005]),
        (0.0, [1.051271, 0.8, 1.2, 1.2, 1.0, 0.99005]),
    ],
)
def test_the_weight_by_direction_is_the_published_one(reward, expected):
    assert six(Egrsd(length_bonus=0.0), reward).metrics["direction"].tolist() == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    ("reward", "advantage", "direction"),  # the teacher's gap is -.05, .5, -3, -.5, 0, .01
    [
        (0.7, 0.2, [0.951229, 1.2, 0.8, 0.8, 1.0, 1.01005]),
        (0.2, -0.3, [1.051271, 0.8, 1.2, 1.2, 1.0, 0.99005]),
        (0.5, 0.0, [1.0] * 6),
    ],
)
def test_the_direction_of_a_share_is_whether_it_is_above_the_mean(reward, advantage, direction):
    result = six(Egrsd(length_bonus=0.0), reward)
    assert result.advantage.tolist() == pytest.approx([advantage] * 6, abs=1e-7)
    assert result.metrics["direction"].tolist() == pytest.approx(direction, abs=1e-6)


def test_reward_direction_and_certainty_multiply_to_the_published_advantage():
    result = six(Egrsd(length_bonus=0.0), 1.0)
    assert result.advantage.tolist() == [0.5] * 6
    expected = [0.473237, 0.48, 0.34, 0.396, 0.35, 0.363618]
    assert (result.weight_N * result.advantage).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gate_that_looks_two_ahead_is_the_published_one():
    objective = ClEgrsd(window=2, gamma=1.0)
    given = batch(STUDENT, TEACHER, teacher_entropy_N=ENTROPY)
    assert objective.gated_entropy(given).tolist() == [0.05, 0.1, 0.1, 0.1, 2.8, 2.8]
    expected = [0.983333, 0.966667, 0.966667, 0.966667, 0.1, 0.1]
    assert six(objective, 1.0).metrics["certainty"].tolist() == pytest.approx(expected, abs=1e-6)


LOOPS = {  # the objective, its window, γ, and whether signals are cached
    Egrsd(): (0, 0.3),
    Egrsd(gamma=1.0, floor=0.3, clip=0.1): (0, 1.0),
    ClEgrsd(): (3, 0.3),
    ClEgrsd(window=50, gamma=1.0, floor=0.3, clip=0.1): (50, 1.0),
    Egrsd(student_signal="cached"): (0, 0.3),
}


@pytest.mark.parametrize("objective", LOOPS, ids=str)
@pytest.mark.parametrize("step", [1, 10, 11])
def test_the_gradient_is_that_of_a_loop_before_and_after_the_rewards_are_whitened(objective, step):
    """The largest entropy is that of the kept tokens; the window ends with the response."""
    (window, gamma), expected = LOOPS[objective], []
    past = [0.0, 1.3, 1.1, 0.0, 0.0]  # r̄ .48, squares about it 1.748
    running = {"reward": Moments(5, 0.48, 1.748)}
    given = replace(ragged(6), step=step, running=running)
    columns = ("student_logp_N", "behaviour_logp_N", "teacher_logp_N", "teacher_entropy_N")
    tokens = rows(given, *columns)
    kept = [h for h, keep in zip(given.teacher_entropy_N.tolist(), KEPT, strict=True) if keep]
    for s, part in enumerate(tokens):
        reward = given.reward_S[s].item() * (1 + 0.5 * (1 - len(part) / 10))
        mean = sum(past) / 5
        sigma = sqrt(sum((r - mean) ** 2 for r in past) / 5)
        a = reward - 0.5 if step <= 10 else (reward - mean) / (sigma + 1e-6)
        a = 0.0 if a != a else a
        for t, (student, behaviour, teacher, _) in enumerate(part):
            gap = teacher - (behaviour if objective.student_signal == "cached" else student)
            w = exp(gap) if a > 0 else exp(-gap) if a < 0 else 1.0
            w = min(max(w, 1 - objective.clip), 1 + objective.clip)
            least = min(entropy for *_, entropy in part[t : t + window + 1])
            omega = min(max(1 - gamma * least / max(*kept, 1.0), objective.floor), 1.0)
            expected.append(exp(student - behaviour) * a * w * omega)
    assert coefficients(objective, with_statistics(objective, given, KEPT)) == pytest.approx(
        expected
    )


def test_entropies_that_are_all_equal_and_small_are_in_units_of_one_nat():
    given = batch([-1.0] * 2, [-1.0] * 2, teacher_entropy_N=[0.5, 0.5], reward=[1.0], running=START)
    objective = ClEgrsd(gamma=1.0)
    result = objective.loss(with_statistics(objective, given))
    assert result.metrics["certainty"].tolist() == [0.5, 0.5]


def test_a_right_answer_is_worth_more_when_short_and_an_unknown_one_gives_no_loss():
    given = batch(
        [-1.0] * 13,
        [-1.0] * 13,
        lengths=[2, 8, 1, 2],
        cap=8.0,
        reward=[1.0, 1.0, NAN, 0.0],
        teacher_entropy_N=[0.0] * 13,
        running=START,
    )
    objective = Egrsd()
    # 1 + .5 · (1 - 2/8)
    assert objective.trajectory_statistics(given)["reward"].nan_to_num(-1).tolist() == [
        1.375,
        1.0,
        -1,
        0.0,
    ]
    result = objective.loss(with_statistics(objective, given))
    assert result.advantage[[0, 2, 10, 11]].tolist() == [0.875, 0.5, 0.0, -0.5]
    assert result.weight_N[10] == 1 and result.loss_N[10] == 0  # w = 1 where A = 0
    assert result.loss_N.isfinite().all()


def test_without_a_bonus_for_length_no_cap_is_read():
    objective = Egrsd(length_bonus=0.0)
    given = batch(
        [-1.0] * 3,
        [-1.0] * 3,
        lengths=[1, 2],
        reward=[1.0, 0.0],
        teacher_entropy_N=[0.0] * 3,
        running=START,
    )
    given = replace(given, cap_S=None)
    assert objective.trajectory_statistics(given)["reward"].tolist() == [1.0, 0.0]
    assert objective.loss(with_statistics(objective, given)).advantage.tolist() == [0.5, -0.5, -0.5]


@pytest.mark.parametrize("objective", [Egrsd(gamma=0.0), ClEgrsd(gamma=0.0)], ids=str)
def test_without_a_gate_no_entropy_is_read(objective):
    assert objective.needs() == Needs(running=("reward",))
    given = replace(batch(STUDENT, TEACHER, reward=[1.0], running=START), teacher_entropy_N=None)
    result = objective.loss(with_statistics(objective, given))
    assert result.metrics["certainty"].tolist() == [1.0] * 6
    assert result.weight_N.tolist() == pytest.approx(
        [0.951229, 1.2, 0.8, 0.8, 1.0, 1.01005], abs=1e-6
    )


def test_a_floor_below_what_the_gate_leaves_is_refused():
    with pytest.raises(
        ValueError,
        match=r"floor = 0\.6: has no effect with gamma = 0\.3, which leaves at least 0\.7",
    ):
        Egrsd(floor=0.6)
    # .7 and .72 are raised
    assert six(Egrsd(gamma=0.3, floor=0.8), 1.0).metrics["certainty"].min().item() == 0.8


def test_a_window_of_no_gate_is_refused():
    with pytest.raises(ValueError, match="window = 5: has no effect with gamma = 0"):
        ClEgrsd(gamma=0.0, window=5)


def test_rewards_that_never_differed_count_as_in_the_first_steps():
    given = batch(
        [-1.0],
        [-0.9],
        teacher_entropy_N=[0.0],
        reward=[0.0],
        step=11,
        running={"reward": Moments(5, 0, 0)},
    )
    objective = Egrsd(correction=Importance(ratio="none"))
    expected = -0.5 * 0.904837  # (0 - .5) · e^-.1
    assert coefficients(objective, with_statistics(objective, given)) == pytest.approx(
        [expected], abs=1e-6
    )


def test_a_step_without_a_kept_token_is_finite():
    objective = Egrsd()
    given = replace(ragged(0), running=START)
    largest = {"teacher_entropy": given.teacher_entropy_N.new_tensor(-float("inf"))}
    assert objective.loss(replace(given, statistics=largest)).loss_N.isfinite().all()
