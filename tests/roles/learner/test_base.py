"""What the learner's ranks say of rollouts by the student's frozen base, against a teacher that
loads the same model."""

from dataclasses import replace
from functools import partial

import msgspec
import numpy as np
import pytest
import torch

from async_opd.core.errors import WireError
from async_opd.core.lora import LoraConfig
from async_opd.core.role_settings import LearnerSettings
from async_opd.core.wire import Group, LearnerShare, Needs, Prompt, Rollout, Scores, Span, Verdict
from async_opd.roles.learner import lora
from async_opd.roles.learner.base import Base, BaseBatch
from async_opd.roles.learner.batch import TrainingBounds, pack, trajectories
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.step import Student, accumulate
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from tests.objectives.test_contract import CASES, CONTEXT, Ranks
from tests.roles.teacher.settings import scorer_settings

NOTHING = Needs()
V, REAL = 40, 33  # the model's vocabulary, and the tokenizer's: ids from 33 on are padding
TOKENS = 24  # of a micro-batch
ASKED = ("teacher_topk", "teacher_at_student_ids", "student_ids", "tail", "teacher_entropy")
NEEDS = {  # of every objective; those of which a scorer is asked for the same are one
    tuple(getattr(needs, name) for name in (*ASKED, "reference")): needs
    for needs in (objective.needs() for objective in CASES)
}
KNOWN = [*range(9), *range(12, 20), *range(22, REAL)]  # ids that the models of all tests have
SCORES = [field.name for field in msgspec.structs.fields(Scores)]
ALONE = lambda tensor, op: None  # noqa: E731 of one rank


@pytest.fixture
def model(tiny_lm, tmp_path):
    """Where the base lies."""
    tiny_lm().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def student(model):
    """Makes a student with an adapter that has learned something, so that it is not its base."""

    def make(dtype="float32"):
        lm = causal_lm.load(model, dtype, torch.device("cpu"))
        lora.wrap(lm, LoraConfig(rank=2, dropout=0.5), 0)
        with torch.no_grad():
            for name, weight in lora.trained(lm).items():
                if "lora_B" in name:
                    weight.normal_(0, 0.3)
        return Student(lm.train(), temperature=0.7)

    return make


def base(student, needs, *, teachers=("",), reference=False, **settings):
    """The base of `student` as `teachers`, or as the reference; `settings` are of each scorer."""
    scoring = scorer_settings(REAL, temperature=0.7, **settings)
    learner = LearnerSettings(
        model="",
        temperature=0.7,
        steps=1,
        max_lag_steps=4,
        stale="mask",
        truncated="train",
        max_new_tokens=64,
        seed=0,
        backend="gloo",
        bucket_bytes=1,
        sync_s=1.0,
        timeout_s=1.0,
        teachers=dict.fromkeys(teachers, scoring),
        reference=msgspec.structs.replace(scoring, as_student=True, section="reference")
        if reference
        else None,
    )
    config = LearnerConfig(trajectories_per_step=1, lr=1e-3, micro_batch_tokens=TOKENS)
    return Base(learner, config, needs, student.lm.config, torch.device("cpu"))


def group(seed, needs=NOTHING, *, lengths=(5, 2), shown=6, teacher=""):
    """One whose teacher is shown another prompt, of `shown` tokens."""
    random = np.random.default_rng(seed)
    k = needs.teacher_at_student_ids
    draw = partial(random.choice, np.array(KNOWN, np.int32))
    rollouts = [
        Rollout(
            id=f"{seed}@0#{i}",
            ids=draw(size=length),
            behaviour_logp=np.full(length, -2, np.float32),
            spans=(Span(version=0, start=0, end=length),),
            truncated=False,
            candidate_ids=draw(size=(length, k)) if k else None,
            candidate_logp=np.full((length, k), -2, np.float32)
            if needs.student_ids == "sampled" and k
            else None,
        )
        for i, length in enumerate(lengths)
    ]
    ids = draw(size=3)
    prompt = Prompt(
        id=f"{seed}@0", ids=ids, answer="", teacher_ids=draw(size=shown), teacher=teacher
    )
    return Group(prompt=prompt, rollouts=tuple(rollouts))


def share_of(groups, *, by_learner=None):
    """All of them, two trajectories to a micro-batch."""
    pairs = [(g, s) for g, each in enumerate(groups) for s in range(len(each.rollouts))]
    return LearnerShare(
        micro_batches=tuple(tuple(pairs[i : i + 2]) for i in range(0, len(pairs), 2)),
        verdicts=tuple(
            tuple(Verdict(id=rollout.id, reward=1.0) for rollout in each.rollouts)
            for each in groups
        ),
        by_learner=tuple(range(len(groups))) if by_learner is None else by_learner,
    )


def scored(student, needs, groups, *, scores=None, **settings):
    """What one rank makes of all of `groups`; of those that have `scores` the reference's alone."""
    share = share_of(groups, by_learner=() if scores else None)
    inside = base(student, needs, **settings)
    return inside.score(student, ALONE, share, groups, scores or (None,) * len(groups))


def at_minus_one(group):
    """Scores of a pool's teacher."""
    return tuple(
        Scores(id=r.id, sampled_logp=np.full(len(r.ids), -1, np.float32)) for r in group.rollouts
    )


def same(one, other):
    """Whether two scores are the same but for rounding."""
    for name in SCORES[1:]:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if name == "topk_ids":
            assert a is None or np.array_equal(a, b)
        elif a is not None:
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=map(str, NEEDS))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(  # the student lacks ids that this model has, which pads its head, and ends otherwise
            vocabulary=((0, 9), (12, 20), (22, REAL)), whole=((0, 20), (22, 36)), ends_as=((1, 34),)
        ),
    ],
    ids=["plain", "holes"],
)
def test_scores_are_those_of_a_teacher_of_the_same_model(student, model, needs, settings):
    groups = tuple(group(seed, needs, lengths=(5, 2, 3)) for seed in range(3))
    got = scored(student(), needs, groups, reference=needs.reference, **settings)
    assert not got.unscored and got.share == share_of(groups)
    scoring = scorer_settings(REAL, temperature=0.7, **settings)
    teacher = TransformersTeacher(scoring, TeacherConfig(model=model), needs)
    reference = TransformersTeacher(scoring, TeacherConfig(model=model), NOTHING)
    for each, scores, references in zip(groups, got.scores, got.references, strict=True):
        shown = each.prompt.teacher_ids
        for i, rollout in enumerate(each.rollouts):
            (expected,) = teacher.score_rollouts([(shown, rollout)])
            assert isinstance(expected, Scores) and scores[i].id == rollout.id
            same(scores[i], expected)
            if needs.reference:  # which reads what the student reads
                same(references[i], *reference.score_rollouts([(each.prompt.ids, rollout)]))
    assert needs.reference or got.references == (None,) * 3


def test_a_base_in_bfloat16_scores_in_it(student, model):
    each = group(0)
    got = scored(student("bfloat16"), Needs(), (each,))
    teacher = TransformersTeacher(
        scorer_settings(REAL, temperature=0.7),
        TeacherConfig(model=model, dtype="bfloat16"),
        Needs(),
    )
    expected = teacher.score_rollouts([(each.prompt.teacher_ids, r) for r in each.rollouts])
    for one, other in zip(got.scores[0], expected, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "objective",
    {type(each).__name__: each for each in CASES}.values(),
    ids=lambda o: type(o).__name__,
)
def test_the_student_learns_and_what_its_base_says_stays_to_the_bit(student, objective):
    needs, student = objective.needs(), student()
    groups = tuple(group(seed, needs) for seed in range(2))
    optimizer = torch.optim.Adam(lora.trained(student.lm).values(), lr=0.02)
    inside = base(student, needs, reference=needs.reference)
    bounds = TrainingBounds(max_lag_steps=4, stale="mask", truncated="train", cap=64)
    before = said = None
    for _ in range(2):
        got = inside.score(student, ALONE, share_of(groups), groups, (None,) * 2)
        micros = [
            pack(batch, bounds, live=0, device=torch.device("cpu"))
            for batch in trajectories(got.share, groups, got.scores, got.references)
        ]
        with torch.no_grad(), lora.undropped(student.lm):
            says = student(micros[0]).sampled_N
        answers = [each for column in (*got.scores, *got.references) for each in column or ()]
        if before is not None:
            for one, other in zip(before, answers, strict=True):
                assert all(np.array_equal(getattr(one, f), getattr(other, f)) for f in SCORES)
            assert not torch.allclose(says, said, atol=1e-4)
        before, said = answers, says
        accumulate(student, lambda loss: loss.backward(), ALONE, objective, micros, CONTEXT)
        assert all(weight.grad is not None for weight in lora.trained(student.lm).values())
        optimizer.step()
        optimizer.zero_grad()


def test_the_adapter_is_on_again_whatever_happens(student, packed):
    student = student()
    trained, eight = lora.trained(student.lm).keys(), torch.arange(8)
    micro = replace(
        packed(),
        ids_L=torch.arange(9),
        segment_lengths=[9],
        rows_N=eight,
        targets_N=eight,
    )

    @torch.no_grad()
    def says():
        with lora.undropped(student.lm):
            return student(micro).sampled_N

    def breaks(module, args):
        raise RuntimeError("out of memory")

    before = says()
    hook = student.lm.get_input_embeddings().register_forward_pre_hook(breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        scored(student, NOTHING, (group(0),))
    hook.remove()
    assert lora.trained(student.lm).keys() == trained  # what requires a gradient
    assert torch.equal(says(), before)
    with lora.adapters_off(student.lm):
        assert not torch.allclose(says(), before, atol=1e-2)  # so that the test can fail
    assert torch.equal(says(), before)


@pytest.mark.parametrize("of", ["teacher", "reference"])
def test_what_cannot_be_scored_is_told_of_and_in_no_micro_batch(student, of):
    """The base is broken at one token, which one of the rollouts holds."""
    student, broken = student(), REAL - 1
    with torch.no_grad():
        student.lm.get_input_embeddings().weight[broken] = torch.nan

    def sound(ids):
        return np.where(ids == broken, 5, ids).astype(np.int32)

    made = [group(seed, lengths=(4, 3)) for seed in (1, 2)]
    ids = [[sound(rollout.ids) for rollout in each.rollouts] for each in made]
    ids[1][0][1] = broken
    change = msgspec.structs.replace
    groups = tuple(
        Group(
            change(
                each.prompt, ids=sound(each.prompt.ids), teacher_ids=sound(each.prompt.teacher_ids)
            ),
            tuple(change(r, ids=mine) for r, mine in zip(each.rollouts, rows, strict=True)),
        )
        for each, rows in zip(made, ids, strict=True)
    )
    reference = of == "reference"
    got = scored(
        student,
        NOTHING,
        groups,
        teachers=() if reference else ("",),
        reference=reference,
        scores=tuple(map(at_minus_one, groups)) if reference else None,
    )
    (failure,) = got.unscored
    assert (failure.id, failure.sample, failure.role) == ("2@0", 0, of)
    assert "sampled_logp" in failure.why and "\n" not in failure.why
    assert got.share.micro_batches == (((0, 0), (0, 1)), ((1, 1),))
    # what is left can be trained
    batches = trajectories(got.share, groups, got.scores, got.references)
    assert [[t.rollout.id for t in batch] for batch in batches] == [["1@0#0", "1@0#1"], ["2@0#1"]]
    assert all((t.reference if reference else t.scores) for batch in batches for t in batch)


def test_an_id_that_the_base_has_not_costs_its_rollout_alone(student):
    each = group(0)
    strange = msgspec.structs.replace(each.rollouts[0], ids=np.full(5, V, np.int32))
    groups = (Group(each.prompt, (strange, each.rollouts[1])),)
    got = scored(student(), Needs(), groups)
    (failure,) = got.unscored
    assert "must be < 40" in failure.why
    assert got.share.micro_batches == (((0, 1),),)


def test_each_teacher_has_its_rows_and_no_group_of_another_is_touched(student):
    groups = group(0, teacher="a"), group(1, teacher="b"), group(2, teacher="a"), group(3)
    scores = at_minus_one(groups[1])
    asked = []

    def module(batch: BaseBatch):
        asked.extend(rollout.id for _, rollout in batch.items)
        return live(batch)

    live = student()
    got = base(live, Needs(), teachers=("a",)).score(
        module, ALONE, share_of(groups, by_learner=(0, 2)), groups, (None, scores, None, None)
    )
    assert sorted(asked) == ["0@0#0", "0@0#1", "2@0#0", "2@0#1"]
    assert got.scores[1] is scores and got.scores[3] is None  # the teacher's own answer
    assert all(s.id == r.id for s, r in zip(got.scores[2], groups[2].rollouts, strict=True))
    with pytest.raises(WireError, match="1@0: has no scores"):
        base(live, Needs(), teachers=("a",)).score(
            module, ALONE, share_of(groups, by_learner=(1,)), groups, (None,) * 4
        )


def test_forwards_hold_no_more_than_a_micro_batch_and_are_as_many_on_every_rank(student):
    """A rank with nothing to score makes them too: under ZeRO-3 they are collective."""
    groups = tuple(group(seed, lengths=(8, 3), shown=9) for seed in range(3))
    shares = [share_of(groups), LearnerShare(micro_batches=((),), verdicts=())]
    sizes = [[], []]
    students = [student(), student()]  # transformers loads one model at a time

    def rank(r, all_reduce):
        live = students[r]

        def module(batch):
            sizes[r].append(sum(len(p) + len(rollout.ids) for p, rollout in batch.items))
            return live(batch)

        mine = groups if r == 0 else ()
        return base(live, NOTHING).score(module, all_reduce, shares[r], mine, (None,) * len(mine))

    full, empty = Ranks(2).run(rank)
    assert sum(sizes[0]) == 3 * (2 * 9 + 8 + 3) and max(sizes[0]) <= TOKENS
    assert len(sizes[0]) > 3 and sizes[1] == [0] * len(sizes[0])
    assert full.metrics == empty.metrics and full.metrics["scoring_s"] > 0
    assert not empty.unscored


def test_a_learner_without_such_a_scorer_makes_no_forward_and_no_reduction(student):
    def never(*args):
        raise AssertionError

    groups = (group(0),)
    scores = (at_minus_one(groups[0]),)
    share = share_of(groups, by_learner=())
    got = base(student(), Needs(), teachers=()).score(never, never, share, groups, scores)
    assert (got.share, got.scores, got.references) == (share, scores, ())
    assert not got.metrics and not got.unscored
