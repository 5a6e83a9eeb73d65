from dataclasses import replace

import msgspec
import numpy as np
import pytest

from async_opd.core.errors import StaleTrajectory, WireError
from async_opd.core.wire import Group, LearnerShare
from async_opd.roles.learner.batch import trajectories


def test_each_response_token_is_predicted_from_the_position_before_it(sample, packed):
    # first trajectory at 0: prompt 0-2, response 3-4; second at 5: prompt 5-6, response 7-9
    first, second = sample(3, [(0, 2)], id="a", seed=1), sample(2, [(0, 3)], id="b", seed=2)
    micro = packed(first, second)
    assert micro.rows_N.tolist() == [2, 3, 6, 7, 8]
    assert micro.segment_lengths == [5, 5]
    assert micro.segment_N.tolist() == [0, 0, 1, 1, 1]
    assert micro.targets_N.tolist() == [*first.rollout.ids, *second.rollout.ids]
    assert micro.ids_L[micro.rows_N + 1].tolist() == micro.targets_N.tolist()


def test_log_probs_and_candidates_stay_with_their_token(sample, packed):
    ids, logp = (
        np.arange(6, dtype=np.int32).reshape(3, 2),
        np.log(np.full((3, 2), 0.25, np.float32)),
    )
    tail = np.log(np.array([0.5, 0.25, 0.125], np.float32))
    first = dict(topk_ids=ids[:1], topk_logp=logp[:1], tail_logp=tail[:1])
    first = sample(spans=[(0, 1)], behaviour=[-1], teacher=[-2], **first)
    second = dict(topk_ids=ids[1:], topk_logp=logp[1:], tail_logp=tail[1:])
    second = sample(spans=[(0, 2)], behaviour=[-3, -4], teacher=[-5, -6], **second)
    micro = packed(first, second)
    assert micro.behaviour_logp_N.tolist() == [-1, -3, -4]
    assert micro.teacher_logp_N.tolist() == [-2, -5, -6]
    assert micro.candidate_ids_NK.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert micro.teacher_logp_NK.tolist() == logp.tolist()
    assert micro.teacher_tail_logp_N.tolist() == tail.tolist()


def test_tokens_over_the_bound_leave_the_reduction_yet_stay_visible(sample, packed):
    micro = packed(sample(spans=[(1, 2), (2, 1), (5, 2)]), live=5, max_lag_steps=3, stale="mask")
    assert micro.lag_N.tolist() == [4, 4, 3, 0, 0]
    assert micro.keep_N.tolist() == [False, False, True, True, True]
    assert len(micro.targets_N) == len(micro.behaviour_logp_N) == 5


@pytest.mark.parametrize(
    ("policy", "kept"), [("mask", [True, True, False, False]), ("train", [True] * 4)]
)
def test_truncated_responses_leave_the_reduction_by_policy(sample, packed, policy, kept):
    micro = packed(sample(spans=[(0, 2)]), sample(spans=[(0, 2)], truncated=True), truncated=policy)
    assert micro.keep_N.tolist() == kept


def test_a_stale_token_under_the_policy_to_drop_is_an_error_that_names_its_trajectory(
    sample, packed
):
    fresh, stale = sample(id="7@0#1", spans=[(1, 4)]), sample(id="7@0#2", spans=[(0, 1), (5, 3)])
    packed(fresh, live=5, max_lag_steps=4, stale="drop")
    with pytest.raises(StaleTrajectory, match=r"7@0#2.*version 5, bound 4"):
        packed(fresh, stale, live=5, max_lag_steps=4, stale="drop")


def test_an_unknown_verdict_is_not_a_wrong_one(sample, packed):
    micro = packed(*(sample(reward=reward) for reward in (1.0, 0.0, 0.3, None)))
    assert micro.reward_S.nan_to_num(-1).tolist() == pytest.approx([1, 0, 0.3, -1])


@pytest.mark.parametrize("part", ["scores", "verdicts"])
def test_what_belongs_to_another_trajectory_is_refused_by_name(sample, packed, part):
    mixed = replace(sample(id="7@0#1"), **{part: getattr(sample(id="8@0#0"), part)})
    with pytest.raises(WireError, match=r"^7@0#1: .*8@0#0"):
        packed(mixed)


def test_scores_of_another_length_are_refused_by_name(sample, packed):
    one = sample(id="7@0#1", spans=[(0, 4)])
    short = msgspec.structs.replace(one.scores, sampled_logp=one.scores.sampled_logp[:3])
    with pytest.raises(WireError, match=r"7@0#1.*3 scores"):
        packed(replace(one, scores=short))


def test_nothing_packs_into_an_empty_micro_batch(packed):
    micro = packed()
    assert len(micro.targets_N) == len(micro.keep_N) == len(micro.reward_S) == 0
    assert micro.segment_lengths == [1] and micro.candidate_ids_NK is None


@pytest.mark.parametrize("column", ["scores", "references", "failure"])
def test_a_rollout_without_scores_is_never_trained_as_the_teachers_own_answer(sample, column):
    one = sample(id="7@0#0")
    rollout = msgspec.structs.replace(one.rollout, failure="" if column != "failure" else "why")
    group = Group(prompt=one.prompt, rollouts=(rollout,))
    share = LearnerShare(micro_batches=(((0, 0),),), verdicts=(one.verdicts,))
    columns = {
        name: ((None if name == column else one.scores,),) for name in ("scores", "references")
    }
    with pytest.raises(WireError, match="7@0#0: it has no scores"):
        trajectories(share, (group,), **columns)
    if column == "scores":  # the teacher's own answer has none at all
        assert trajectories(share, (group,), (None,))[0][0].from_teacher


def test_a_trajectory_has_its_groups_number_in_the_step(sample, packed):
    ones = [sample(id=f"{i}@0#0") for i in range(2)]
    groups = [Group(prompt=one.prompt, rollouts=(one.rollout,)) for one in ones]
    verdicts, scores = tuple(o.verdicts for o in ones), tuple((o.scores,) for o in ones)
    for numbers, total, expected in (((), 0, [1, 0]), ((3, 7), 9, [7, 3])):
        share = LearnerShare(
            micro_batches=(((1, 0), (0, 0)),), verdicts=verdicts, numbers=numbers, total=total
        )
        (mine,) = trajectories(share, tuple(groups), scores)
        assert packed(*mine).group_S.tolist() == expected
        assert share.groups == (total or 2)


@pytest.mark.parametrize(
    ("train_stop", "kept"), [(True, [True] * 7), (False, [True, True, False, False, *[True] * 3])]
)
def test_the_tokens_of_a_stop_leave_the_reduction_by_policy(sample, packed, train_stop, kept):
    stopped = sample(spans=[(0, 4)], stop_tokens=2)
    micro = packed(stopped, sample(id="b", spans=[(0, 3)], seed=1), train_stop=train_stop)
    assert micro.keep_N.tolist() == kept
    assert len(micro.targets_N) == 7  # the objective sees them all the same


def test_only_where_updates_leave_kv_as_it_is_it_lags_behind_the_weights_of_its_token(
    sample, packed
):
    spans = [(1, 2), (2, 2)]
    micro = packed(
        sample(2, spans), sample(2, spans, kept_kv=True), sample(1, [(3, 2)], kept_kv=True), live=5
    )
    assert micro.lag_N.tolist() == [4, 4, 3, 3, 4, 4, 3, 3, 2, 2]
    # the prompt's and the first token's KV is of version 1, the others' of version 2
    assert micro.kv_lag_N.tolist() == pytest.approx([0] * 4 + [0, 0, 3 / 4, 3 / 5] + [0] * 2)
