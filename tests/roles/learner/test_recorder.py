import math
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch

from async_opd.objectives.dear import Dear
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner.recorder import Recorder
from async_opd.roles.learner.step import StepContext, accumulate


@pytest.fixture
def samples(sample):
    """Five trajectories of unequal lengths, each of tokens of versions 0 and 1."""
    return [
        sample(2 + i, [(0, 3 + i), (1, 2)], id=id, seed=i, reward=i / 4)
        for i, id in enumerate("abcde")
    ]


def step(student, objective, samples, packed, cuts=(0, 2, 5), look=True):
    """What is kept of a step on `samples`, cut into micro-batches, and its gradients."""
    given = [samples[a:b] for a, b in pairwise(cuts)]
    micros = [packed(*part, live=1) for part in given]
    recorder = Recorder(objective, given, micros, live=1)
    student.zero_grad()
    accumulate(
        student,
        lambda loss: loss.backward(),
        lambda tensor, op: None,
        objective,
        micros,
        StepContext(step=2, max_lag_steps=4),
        recorder.look if look else None,
    )
    return recorder.recorded, [p.grad.clone() for p in student.parameters()]


def test_two_trajectories_are_kept_with_the_numbers_of_the_formula(student, samples, packed):
    found, _ = step(student, Opd(correction=Importance(at_most=1.5)), samples, packed)
    by_id = {s.rollout.id: s for s in samples}
    assert len(found) == 2 and all(one.step == 2 for one in found)
    for one in found:
        sample, numbers = by_id[one.id], one.numbers
        assert (one.ids == sample.rollout.ids).all() and (one.prompt_ids == sample.prompt.ids).all()
        assert one.reward == sample.verdicts[0].reward
        np.testing.assert_array_equal(numbers["behaviour"], sample.rollout.behaviour_logp)
        np.testing.assert_array_equal(numbers["teacher"], sample.scores.sampled_logp)
        np.testing.assert_array_equal(numbers["version"], sample.rollout.versions())
        advantage = numbers["teacher"] - numbers["student"]
        ratio = np.minimum(np.exp(numbers["student"] - numbers["behaviour"]), 1.5)
        np.testing.assert_allclose(numbers["advantage"], advantage, atol=1e-6)
        np.testing.assert_allclose(numbers["ratio"], ratio, rtol=1e-5)
        np.testing.assert_allclose(numbers["coefficient"], ratio * advantage, atol=1e-5)
        assert set(numbers["selected"]) == {1} and set(numbers["kept"]) == {1}


def test_what_its_teacher_read_is_kept_where_that_was_another_prompt(student, samples, packed):
    theirs = np.arange(3000, dtype=np.int32)
    shown = {s.rollout.id: None if i % 2 else theirs for i, s in enumerate(samples)}
    given = [
        replace(s, prompt=msgspec.structs.replace(s.prompt, teacher_ids=shown[s.rollout.id]))
        for s in samples
    ]
    found, _ = step(student, Opd(), given, packed)
    kept = {one.id: one.teacher_prompt_ids for one in found}
    for id, ids in kept.items():
        assert (ids is None) == (shown[id] is None)
        assert ids is None or ids.tolist() == theirs[-2000:].tolist()


def test_the_choice_depends_neither_on_place_nor_on_micro_batch(student, samples, packed):
    found = {
        tuple(sorted(one.id for one in step(student, Opd(), order, packed, cuts)[0]))
        for order, cuts in [(samples, (0, 2, 5)), (samples[::-1], (0, 5)), (samples, (0, 0, 4, 5))]
    }
    assert len(found) == 1


def test_looking_changes_no_gradient(student, samples, packed):
    objective = Dear(p=0.4)
    for seen, unseen in zip(
        *(step(student, objective, samples, packed, look=x)[1] for x in (True, False)), strict=True
    ):
        assert torch.equal(seen, unseen)


def test_what_dear_selects_and_reads_is_kept(student, samples, packed):
    found, _ = step(student, Dear(p=0.2, q=0.2), samples, packed)
    for one in found:
        assert set(one.numbers["selected"]) == {0, 1}  # some and not all
        assert len(one.numbers["student_entropy"]) == len(one.ids)
        assert (one.numbers["coefficient"] == 0).tolist() == (one.numbers["selected"] == 0).tolist()


def test_of_a_divergence_there_is_no_advantage_and_no_number_a_candidate(student, sample, packed):
    ids, logp = np.array([[1, 2]] * 3, np.int32), np.full((3, 2), math.log(0.3), np.float32)
    one = sample(
        topk_ids=ids,
        topk_logp=logp,
        tail_logp=np.full(3, math.log(0.4), np.float32),
        spans=[(1, 3)],
    )
    found, _ = step(student, TopkKl(k=2), [one], packed, (0, 1))
    assert {
        name for name in found[0].numbers if "advantage" in name or "coefficient" in name
    } == set()
    assert len(found[0].numbers["student"]) == 3


def test_a_long_response_is_cut_and_says_so(student, samples, packed, monkeypatch):
    monkeypatch.setattr("async_opd.roles.learner.recorder.LONGEST", 2)
    for one in step(student, Opd(), samples, packed)[0]:
        sample = next(s for s in samples if s.rollout.id == one.id)
        assert one.ids.tolist() == sample.rollout.ids[:2].tolist() and one.tokens == len(
            sample.rollout.ids
        )
        assert one.prompt_ids.tolist() == sample.prompt.ids[
            -2:
        ].tolist() and one.prompt_tokens == len(sample.prompt.ids)
        assert {len(column) for column in one.numbers.values()} == {2}


def test_the_teachers_own_answers_are_not_kept(student, sample, packed):
    answer, own = replace(sample(id="t"), scores=None), [sample(id=id, seed=3) for id in "ab"]
    found, _ = step(student, Opd(), [answer, *own], packed, (0, 1, 3))
    assert sorted(one.id for one in found) == ["a", "b"]
