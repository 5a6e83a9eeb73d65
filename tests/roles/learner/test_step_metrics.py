from dataclasses import replace
from math import isnan, log

import msgspec
import numpy as np
import pytest
import torch

from async_opd.core.wire import Scores, Verdict
from async_opd.maths.advantages import Moments
from async_opd.maths.logprobs import Read
from async_opd.objectives.egrsd import Egrsd
from async_opd.objectives.iw_opd import IwOpd
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.modifiers import Position
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance
from async_opd.objectives.sg_opd import SgOpd
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner.step import StepContext, accumulate


def measured(objective, micro, student, candidates=None, **context):
    """Metrics and running moments of one micro-batch, read by a student of these log-probs."""

    def module(micro, needs):
        columns = [
            None if x is None else torch.tensor(x).requires_grad_() for x in (student, candidates)
        ]
        return Read(columns[0], None, columns[1], None, None)

    return accumulate(
        module,
        lambda loss: loss.backward(),
        lambda *_: None,
        objective,
        [micro],
        StepContext(**context),
    )


def test_the_shares_of_method_ratio_and_advantage_are_those_of_the_logarithm_of_their_product(
    sample, packed
):
    micro = packed(sample(spans=[(0, 2)], behaviour=[-1 - log(2), -1], teacher=[-0.5, -2]))
    found, _ = measured(IwOpd(), micro, [-1.0, -1.0])
    # W 1.5 and 4/3 (.5 of 1.5 nats are spent), ρ 2 and 1, |A| .5 and 1: 1.5 and 4/3
    assert found["weight_mean"] == pytest.approx(17 / 12) and found["weight_max"] == pytest.approx(
        1.5
    )
    assert found["weight_ess"] == pytest.approx((17 / 6) ** 2 / (2 * (9 / 4 + 16 / 9)))
    assert found["ratio_mean"] == pytest.approx(1.5) and found["ratio_ess"] == pytest.approx(9 / 10)
    shares = [found[f"weight_by_{factor}"] for factor in ("method", "ratio", "advantage")]
    assert shares == pytest.approx([1.0, log(2) / log(9 / 8), log(1 / 2) / log(9 / 8)], rel=1e-4)
    assert sum(shares) == pytest.approx(1)


def test_a_metric_is_the_mean_over_the_tokens_that_have_it_and_none_where_no_token_has(
    sample, packed
):
    narrow = Importance(ratio="prefix_normalised", narrowing=(0.01, 0.02))
    # of eight tokens only the sixth has moved: w_t leaves [1 - .01 h, 1 + .02 h] from there on
    micro = packed(sample(spans=[(0, 8)], behaviour=[-1] * 5 + [-2, -1, -1], teacher=[-1] * 8))
    found, _ = measured(Opd(correction=narrow), micro, [-1.0] * 8)
    assert [found[f"prefix_kept_{quarter}"] for quarter in (1, 2, 3, 4)] == [1, 1, 0.5, 0]
    short = packed(sample(spans=[(0, 2)], behaviour=[-1] * 2, teacher=[-1] * 2))
    found, _ = measured(Opd(correction=narrow), short, [-1.0] * 2)
    assert found["prefix_kept_1"] == found["prefix_kept_3"] == 1
    assert isnan(found["prefix_kept_2"]) and isnan(found["prefix_kept_4"])


def test_weights_are_those_of_the_selected_tokens(sample, packed):
    micro = packed(sample(spans=[(0, 4)], behaviour=[-1] * 4, teacher=[-3, -1.5, -9, -9]))
    found, _ = measured(IwOpd(gamma=0.0, position=Position(share=0.5)), micro, [-1.0] * 4)
    assert found["selected"] == 0.5 and found["tokens"] == 4
    # 2 and .5
    assert found["weight_mean"] == pytest.approx(1.25) and found["weight_max"] == pytest.approx(2)


def test_each_of_several_samples_is_a_weight_of_its_own(sample, packed):
    one = sample(spans=[(0, 1)], behaviour=[-1], teacher=[-2])
    arrays = dict(
        candidate_ids=np.array([[5, 6]], np.int32), candidate_logp=np.array([[-1, -2]], np.float32)
    )
    rollout = msgspec.structs.replace(one.rollout, **arrays)
    scores = msgspec.structs.replace(one.scores, candidate_logp=np.float32([[-4, -2 - log(2)]]))
    micro = packed(replace(one, rollout=rollout, scores=scores))
    # ρ 1, 1, .5 and |A| 1, 3, 0
    found, _ = measured(McOpd(m=3), micro, [-1.0], [[-1.0, -2.0 - log(2)]])
    assert found["weight_mean"] == pytest.approx(4 / 3) and found["weight_max"] == pytest.approx(3)
    assert found["weight_ess"] == pytest.approx(16 / 30)
    assert found["ratio_mean"] == pytest.approx(2.5 / 3)


def test_how_often_the_bounds_act_is_told_where_they_are_set(sample, packed):
    """A teacher that forbids one of the 500 tokens: the others count again, and its weight is what
    is allowed."""
    teacher = [-3000.0] + [-1.5] * 499
    micro = packed(sample(spans=[(0, 500)], behaviour=[-1.0] * 499 + [-5.0], teacher=teacher))
    off, _ = measured(Opd(), micro, [-1.0] * 500)
    assert off["weight_max"] == pytest.approx(2999) and off["weight_ess"] < 0.003
    assert not {"signal_bounded", "weight_bounded"} & off.keys()
    on, _ = measured(Opd(signal_at_most=2.0, weight_at_most=1.25), micro, [-1.0] * 500)
    assert on["signal_bounded"] == on["weight_bounded"] == pytest.approx(1 / 500)
    assert on["weight_max"] == pytest.approx(2.0) and on["weight_ess"] > 0.9
    assert on["kl"] == off["kl"]
    one, _ = measured(Opd(weight_at_most=1.25), micro, [-1.0] * 500)
    assert "signal_bounded" not in one and one["weight_bounded"] == pytest.approx(1 / 500)


def test_a_divergence_without_a_ratio_has_weights_of_one(sample, packed):
    top = dict(
        topk_ids=np.array([[5, 6]] * 2, np.int32), topk_logp=np.log(np.float32([[0.5, 0.25]] * 2))
    )
    micro = packed(sample(spans=[(0, 2)], **top))
    found, _ = measured(
        TopkKl(k=2, rest="renormalise"), micro, [-1.0, -1.0], np.log(np.float32([[0.25, 0.5]] * 2))
    )
    assert [found[f"{w}_{m}"] for w in ("weight", "ratio") for m in ("mean", "max", "ess")] == [
        1.0
    ] * 6
    assert [found[f"weight_by_{factor}"] for factor in ("method", "ratio", "advantage")] == [
        0.0
    ] * 3


def in_group(one, *verdicts):
    """The trajectory as the first of a group of these verdicts, with a reference."""
    words = tuple(
        Verdict(id=f"{one.rollout.id}{i}" if i else one.rollout.id, reward=v)
        for i, v in enumerate(verdicts)
    )
    return replace(one, verdicts=words, reference=one.scores)


def test_sg_opd_shows_the_shares_of_kept_tokens_that_agree_disagree_or_have_no_sign(sample, packed):
    right = in_group(sample(spans=[(0, 3)], id="a", teacher=[-0.5, -2, -1]), True, False)
    unknown = in_group(sample(spans=[(0, 2)], id="b", teacher=[-0.5, -2]), None, True)
    cut = in_group(sample(spans=[(0, 1)], id="c", teacher=[-0.5], truncated=True), True, False)
    found, _ = measured(SgOpd(), packed(right, unknown, cut, truncated="mask"), [-1.0] * 6)
    assert [found[name] for name in ("agree", "disagree", "no_sign")] == pytest.approx(
        [0.2, 0.2, 0.6]
    )


def test_each_response_has_the_same_say_in_a_step_of_sg_opd_however_long_it_is(sample, packed):
    short, long = (
        in_group(
            sample(spans=[(0, n)], id=f"{n}", behaviour=[-1] * n, teacher=[gap - 1] * n), None, True
        )
        for n, gap in ((1, -0.5), (3, -0.2))
    )
    found, _ = measured(SgOpd(), packed(short, long), [-1.0] * 4)
    # an unknown verdict leaves A = log π_T - log π and φ = 1: losses of -.5 once and of -.2 three
    # times
    assert found["loss"] == pytest.approx(-0.35)  # over all tokens it would be -.275


@pytest.mark.parametrize(
    # -1 and -2 of the one response, -4 of the other; its first half is selected
    ("mean_over", "loss"),
    [("tokens", -5 / 3), ("selected", -5 / 2), ("sequences", (-1 / 2 - 4) / 2)],
)
def test_a_mean_is_over_tokens_or_the_selected_of_them_or_first_over_each_response(
    mean_over, loss, sample, packed
):
    long = sample(spans=[(0, 2)], id="a", behaviour=[-1] * 2, teacher=[-2, -3])
    short = sample(spans=[(0, 1)], id="b", behaviour=[-1], teacher=[-5])
    objective = Opd(position=Position(share=0.5), mean_over=mean_over)
    assert measured(objective, packed(long, short), [-1.0] * 3)[0]["loss"] == pytest.approx(loss)


def test_known_rewards_join_the_running_moments_after_the_step_that_saw_them(sample, packed):
    entropy = dict(entropy=np.float32([0.5, 0.5]))
    trajectories = [
        sample(spans=[(0, 2)], id=str(i), reward=v) for i, v in enumerate([1.0, 0.0, None])
    ]
    scores = [
        Scores(id=t.rollout.id, sampled_logp=np.float32([-1, -1]), **entropy) for t in trajectories
    ]
    micro = packed(
        *(replace(t, scores=s) for t, s in zip(trajectories, scores, strict=True)), cap=4
    )
    running = {"reward": Moments(2, 1.0, 0.5)}
    found, after = measured(Egrsd(), micro, [-1.0] * 6, step=3, running=running)
    # 1.25 and 0 of mean .625 join two of mean 1: mean .8125, squares .5 + .78125 + .375² · 2 · 2 /
    # 4
    assert tuple(after["reward"]) == pytest.approx((4, 0.8125, 1.421875))
    assert found["direction"] == 1 and found["certainty"] == pytest.approx(0.85)  # 1 - .3 · .5 / 1


def test_a_share_of_a_reward_joins_the_running_moments_as_it_is(sample, packed):
    micro = packed(*(sample(spans=[(0, 2)], id=f"{x}", reward=x) for x in (0.2, 0.8)))
    objective, running = Egrsd(gamma=0, length_bonus=0.0), {"reward": Moments()}
    _, after = measured(objective, micro, [-1.0] * 4, step=1, running=running)
    assert tuple(after["reward"]) == pytest.approx((2, 0.5, 0.18))  # mean .5, .3² twice


def test_a_wrong_answer_that_was_cut_and_left_the_loss_counts_in_the_running_mean(sample, packed):
    short = dict(spans=[(0, 3)], reward=1.0)
    cut = sample(spans=[(0, 4)], id="cut", reward=0.0, truncated=True)
    trajectories = [sample(id="a", **short), sample(id="b", **short), cut]
    scored = []
    for one in trajectories:
        entropy = np.full(len(one.rollout.ids), 0.5, np.float32)
        scored.append(replace(one, scores=msgspec.structs.replace(one.scores, entropy=entropy)))
    micro = packed(*scored, cap=4, truncated="mask")
    found, after = measured(Egrsd(), micro, [-1.0] * 10, running={"reward": Moments()})
    assert found["tokens"] == 6 and found["tokens_excluded"] == 4
    # (1.125 + 1.125 + 0) / 3
    assert after["reward"].number == 3 and after["reward"].mean == pytest.approx(0.75)


def test_the_histogram_of_lag_counts_every_trained_token_once_whatever_the_split(sample, packed):
    own = [
        sample(spans=[(3, 2), (4, 1)], id="a"),
        sample(spans=[(2, 4), (5, 3)], id="b"),
        sample(spans=[(1, 9)]),
    ]
    bounds = dict(live=5, max_lag_steps=3)
    for micros in ([packed(*own, **bounds)], [packed(one, **bounds) for one in own]):
        found, _ = accumulate(
            lambda micro, needs: Read(
                torch.zeros(len(micro.targets_N)).requires_grad_(), *[None] * 4
            ),
            lambda loss: loss.backward(),
            lambda *_: None,
            Opd(),
            micros,
            StepContext(max_lag_steps=3),
        )
        histogram = {
            name: tokens for name, tokens in found.items() if name.startswith("tokens_lag")
        }
        assert histogram == {
            "tokens_lag_0": 3,
            "tokens_lag_1": 1,
            "tokens_lag_2": 2,
            "tokens_lag_3": 4,
        }
        assert found["tokens"] == 10 and found["tokens_excluded"] == 9


def test_a_synchronous_run_has_a_histogram_of_one_bar(sample, packed):
    found, _ = measured(Opd(), packed(sample(spans=[(5, 2)]), live=5, max_lag_steps=0), [-1.0] * 2)
    assert {n: t for n, t in found.items() if n.startswith("tokens_lag")} == {"tokens_lag_0": 2}
