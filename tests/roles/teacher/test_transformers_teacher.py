import asyncio
import time

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from async_opd.core.errors import DataError
from async_opd.core.vocabulary import runs
from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.maths.logprobs import Head
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.roles.teacher.self_teacher import WeightEma
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from async_opd.toy import TEACHER
from tests.roles.teacher.settings import scorer_settings
from tests.simulated.virtual_time import virtual

V, REAL = 40, 33  # the model's vocabulary, and the tokenizer's: ids from 33 on are padding
NOTHING = Needs()


@pytest.fixture
def model(tiny_lm, tmp_path):
    """The teacher's weights as transformers runs them by itself; saved where `teacher` loads
    them."""
    model = tiny_lm(attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    return model


@pytest.fixture
def forwards(monkeypatch) -> list[list[int]]:
    """The lengths of the segments of each forward."""
    lengths, forward = [], causal_lm.hidden_states

    def hidden_states(model, ids_L, segment_lengths):
        lengths.append(segment_lengths)
        return forward(model, ids_L, segment_lengths)

    monkeypatch.setattr(causal_lm, "hidden_states", hidden_states)
    return lengths


@pytest.fixture
def teacher(model, tmp_path, forwards):
    """Makes a teacher."""

    def make(needs=NOTHING, *, temperature=0.7, longest=6, end=1, **settings):
        config = TeacherConfig(model=str(tmp_path), **settings)
        scoring = scorer_settings(
            REAL, temperature=temperature, max_new_tokens=longest, eos_ids=(end,)
        )
        made = TransformersTeacher(scoring, config, needs)
        forwards.clear()  # of loading, which tries the model
        return made

    return make


@pytest.fixture
def group():
    def make(seed=0, *, samples=2, prompt_tokens=3, tokens=(4, 2), candidates=0, teacher_ids=None):
        random = np.random.default_rng(seed)
        rollouts = [
            Rollout(
                id=f"{seed}@0#{i}",
                ids=random.integers(REAL, size=tokens[i], dtype=np.int32),
                behaviour_logp=np.full(tokens[i], -1, np.float32),
                spans=(Span(version=0, start=0, end=tokens[i]),),
                truncated=False,
                candidate_ids=random.integers(V, size=(tokens[i], candidates), dtype=np.int32)
                if candidates
                else None,
            )
            for i in range(samples)
        ]
        ids = random.integers(REAL, size=prompt_tokens, dtype=np.int32)
        return Group(
            prompt=Prompt(id=f"{seed}@0", ids=ids, answer="", teacher_ids=teacher_ids),
            rollouts=tuple(rollouts),
        )

    return make


@torch.no_grad()
def plain_logp(model, prompt_ids, rollout, temperature=0.7):
    """Log-probs [T, V] of the response positions of one rollout, one forward of it alone."""
    ids = torch.as_tensor(np.concatenate([prompt_ids, rollout.ids])).long()
    return torch.log_softmax(
        model(ids[None]).logits[0, len(prompt_ids) - 1 : -1] / temperature, dim=-1
    )


async def scores_of(scorer, group):
    """The scores of a group of which each rollout has some."""
    causes, scores = await scorer.score(group)
    assert causes == ("",) * len(group.rollouts)
    return scores


def close(got, expected):
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=1e-5, rtol=0)


def outside(logp_TV, ids_TK):
    """Log of what is left by some ids, padding among it."""
    return logp_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)


async def test_the_tail_of_the_likeliest_is_that_of_all_other_ids(model, teacher, group):
    one = group()
    for rollout, got in zip(
        one.rollouts, await scores_of(teacher(Needs(teacher_topk=3, tail=True)), one), strict=True
    ):
        logp_TV = plain_logp(model, one.prompt.ids, rollout)
        close(got.tail_logp, outside(logp_TV, logp_TV[:, :REAL].topk(3).indices))


@pytest.mark.parametrize("chunk", [1, 5, 1024])
async def test_scores_equal_a_plain_forward_of_each_rollout_alone(
    model, teacher, group, forwards, chunk
):
    needs = Needs(teacher_topk=3, teacher_entropy=True, teacher_at_student_ids=2, tail=True)
    scorer = teacher(needs, head_chunk_rows=chunk)
    groups = [group(seed, candidates=2, tokens=(4 + seed, 1)) for seed in range(3)]
    answers = await asyncio.gather(*(scores_of(scorer, one) for one in groups))
    assert len(forwards) == 1  # three groups, two rollouts each, one forward
    for one, scores in zip(groups, answers, strict=True):
        for rollout, got in zip(one.rollouts, scores, strict=True):
            logp_TV = plain_logp(model, one.prompt.ids, rollout)
            top = logp_TV[:, :REAL].topk(3)
            assert got.id == rollout.id
            close(
                got.sampled_logp,
                logp_TV.gather(1, torch.as_tensor(rollout.ids).long()[:, None])[:, 0],
            )
            close(
                got.candidate_logp, logp_TV.gather(1, torch.as_tensor(rollout.candidate_ids).long())
            )
            close(got.entropy, -(logp_TV.exp() * logp_TV).sum(-1))
            close(got.tail_logp, outside(logp_TV, torch.as_tensor(rollout.candidate_ids).long()))
            close(got.topk_logp, top.values)
            assert got.topk_ids.tolist() == top.indices.tolist()


async def test_what_no_objective_needs_is_not_computed(teacher, group):
    (scores, _) = await scores_of(teacher(), group())
    assert (scores.topk_ids, scores.topk_logp, scores.entropy, scores.candidate_logp) == (None,) * 4
    assert scores.tail_logp is None


async def test_only_response_positions_reach_the_head(teacher, group, forwards, monkeypatch):
    scorer, rows, logits = teacher(), [], Head.logits
    monkeypatch.setattr(
        Head,
        "logits",
        lambda head, hidden, *ids: rows.append(len(hidden)) or logits(head, hidden, *ids),
    )
    await scorer.score(group(prompt_tokens=7, tokens=(4, 2)))
    assert sum(rows) == 6 and forwards == [[11, 9]]


async def test_padding_of_the_vocabulary_is_never_a_candidate_yet_takes_its_share(
    model, teacher, group
):
    one = group()
    (scores, _) = await scores_of(teacher(Needs(teacher_topk=REAL)), one)
    assert scores.topk_ids.max() == REAL - 1
    padding_T = plain_logp(model, one.prompt.ids, one.rollouts[0])[:, REAL:].exp().sum(-1)
    close(np.exp(scores.topk_logp).sum(-1), 1 - padding_T)
    assert padding_T.min() > 1e-3


async def test_the_temperature_of_sampling_is_applied(model, teacher, group):
    one = group()
    (scores, _) = await scores_of(teacher(Needs(teacher_entropy=True), temperature=2.0), one)
    logp_TV = plain_logp(model, one.prompt.ids, one.rollouts[0], temperature=2.0)
    close(scores.entropy, -(logp_TV.exp() * logp_TV).sum(-1))


async def test_a_prompt_that_the_teacher_renders_its_own_way_is_scored_so(model, teacher, group):
    own = np.array([5, 6, 7, 8, 9], np.int32)
    one = group(teacher_ids=own)
    (scores, _) = await scores_of(teacher(), one)
    logp_TV = plain_logp(model, own, one.rollouts[0])
    close(
        scores.sampled_logp,
        logp_TV.gather(1, torch.as_tensor(one.rollouts[0].ids).long()[:, None])[:, 0],
    )


async def test_a_reference_reads_what_the_student_was_asked(model, tmp_path, group):
    config = ReferenceConfig(model=str(tmp_path))
    settings = scorer_settings(REAL, temperature=0.7, as_student=True)
    reference = TransformersTeacher(settings, config, NOTHING)
    one = group(teacher_ids=np.array([5, 6, 7, 8, 9], np.int32), candidates=2)
    (scores, _) = await scores_of(reference, one)
    close(scores.sampled_logp, sampled(model, one))
    assert scores.candidate_logp is None  # those are for the teacher


def sampled(model, group) -> torch.Tensor:
    """Log-probs of the first response of `group` after the student's prompt."""
    rollout = group.rollouts[0]
    logp_TV = plain_logp(model, group.prompt.ids, rollout)
    return logp_TV.gather(1, torch.as_tensor(rollout.ids).long()[:, None])[:, 0]


@pytest.fixture
def student(tiny_lm, tmp_path):
    """Saves a student in `tmp_path`/student, and returns it."""

    def make(seed: int, dtype=torch.float32):
        lm = tiny_lm(seed=seed, attn_implementation="eager").to(dtype).eval()
        lm.save_pretrained(tmp_path / "student")
        return lm

    return make


async def test_a_copy_scores_as_the_student_does(teacher, group, student, tmp_path):
    scorer, one = teacher(update="copy"), group()
    for seed in (1, 2):
        live = student(seed)
        await scorer.load(str(tmp_path / "student"))
        (scores, _) = await scores_of(scorer, one)
        close(scores.sampled_logp, sampled(live, one))


async def test_an_average_moves_by_its_share_at_each_update(
    model, teacher, group, student, tmp_path
):
    scorer, one = teacher(update="ema", ema_decay=0.75), group()
    for seed in (1, 2):
        live = student(seed)
        await scorer.load(str(tmp_path / "student"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.75 * parameter + 0.25 * live.get_parameter(name))
        (scores, _) = await scores_of(scorer, one)
        close(scores.sampled_logp, sampled(model, one))


def test_steps_too_small_for_bfloat16_add_up_in_the_average(tiny_lm):
    model, student = tiny_lm().bfloat16(), tiny_lm(seed=1).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    before, goal = (lm.get_parameter(name).detach().float() for lm in (model, student))
    ema = WeightEma(model, 0.999)
    for _ in range(100):
        ema.update(dict(student.named_parameters()))
    moved = model.get_parameter(name).detach().float() - before
    expected = (1 - 0.999**100) * (goal - before)  # 9.5 % of the way
    # half a step of bfloat16 below 2
    torch.testing.assert_close(moved, expected, atol=0.004, rtol=0)
    assert expected.abs().mean() > 0.02


async def test_no_score_is_of_weights_in_the_middle_of_an_update(
    model, teacher, group, student, tmp_path, monkeypatch
):
    class Slow(WeightEma):
        def update(self, student):
            everything = self._parameters
            for name, parameter in everything.items():
                self._parameters = {name: parameter}
                super().update(student)
                time.sleep(0.01)

    monkeypatch.setattr("async_opd.roles.teacher.transformers_teacher.WeightEma", Slow)
    scorer, one, live = teacher(update="copy"), group(), student(1)
    old, new = sampled(model, one), sampled(live, one)

    async def is_old() -> bool:
        (scores, _) = await scores_of(scorer, one)
        if np.allclose(scores.sampled_logp, old, atol=1e-5):
            return True
        close(scores.sampled_logp, new)
        return False

    assert await is_old()
    loading = asyncio.create_task(scorer.load(str(tmp_path / "student")))
    while not loading.done():
        await is_old()
    assert not await is_old()


async def test_a_checkpoint_that_a_node_does_not_see_is_named(teacher, tmp_path):
    with pytest.raises(
        DataError,
        match=r"a self-teacher finds no .*/away: run.dir must lie on a disk that every node",
    ):
        await teacher(update="copy").load(f"{tmp_path}/away")


async def test_a_forward_takes_the_oldest_that_fit_its_budget(teacher, group, forwards):
    scorer = teacher(batch_tokens=16)  # segments of 3 + 4 and 3 + 2 tokens, so 7, 5, 7, 5, 7, 5
    await asyncio.gather(*(scorer.score(group(seed)) for seed in range(3)))
    assert forwards == [[7, 5], [7, 5], [7, 5]]


async def test_a_rollout_over_the_budget_is_scored_alone(teacher, group, forwards):
    scorer = teacher(batch_tokens=6)
    await scorer.score(group())
    assert forwards == [[7], [5]]


async def test_requests_that_come_during_a_forward_share_the_next(teacher, group, forwards):
    scorer = teacher()
    first = asyncio.create_task(scorer.score(group(0)))
    while not forwards:
        await asyncio.sleep(0)
    await asyncio.gather(first, *(scorer.score(group(seed)) for seed in (1, 2, 3)))
    # the first may end in between
    assert [len(lengths) for lengths in forwards] in ([2, 6], [2, 2, 4])


def test_a_request_waits_for_company_no_longer_than_the_flush(teacher, group, forwards):
    async def main():
        scorer = teacher(flush_s=3.0)
        first = asyncio.create_task(scorer.score(group(0)))
        await asyncio.sleep(1)
        await asyncio.gather(first, scorer.score(group(1)))
        assert [len(lengths) for lengths in forwards] == [4]
        assert asyncio.get_running_loop().time() == 3

    virtual(main())


def test_a_full_batch_does_not_wait_for_the_flush(teacher, group):
    async def main():
        await teacher(flush_s=60.0, batch_tokens=12).score(group())
        assert asyncio.get_running_loop().time() == 0

    virtual(main())


async def test_a_prompt_that_the_teacher_cannot_read_costs_its_own_group(teacher, group):
    scorer, bad = teacher(), group()
    bad.prompt.ids[0] = V  # no such row in the embedding
    (causes, scores), others = await asyncio.gather(scorer.score(bad), scores_of(scorer, group(7)))
    assert causes == tuple(
        f"0@0#{i}: the prompt holds 40: must be < 40, the number of the teacher's logits"
        for i in range(2)
    )
    assert scores == (None, None)
    assert [scores.id for scores in others] == ["7@0#0", "7@0#1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            dict(candidate_ids=V),
            "0@0#1: candidate_ids holds 40: must be < 40, the number of the te",
        ),
        (dict(candidate_ids=-1), "0@0#1: candidate_ids holds -1: must be < 40"),
        (dict(ids=V + 2), "0@0#1: ids holds 42: must be < 40"),
        (dict(ids=-3), "0@0#1: ids holds -3: must be < 40"),
        (dict(candidate_ids=None), "0@0#1: has no candidate_ids"),
        (dict(failure="0@0#1: it failed before"), "0@0#1: it failed before"),
    ],
    ids=str,
)
async def test_a_rollout_that_cannot_be_scored_costs_itself_alone(
    model, teacher, group, change, says
):
    scorer, one = teacher(Needs(teacher_at_student_ids=2)), group(candidates=2)
    good, bad = one.rollouts
    for field, value in change.items():
        if isinstance(value, int):
            getattr(bad, field)[1] = value
        else:
            bad = msgspec.structs.replace(bad, **{field: value})
    (causes, (scores, none)), others = await asyncio.gather(
        scorer.score(msgspec.structs.replace(one, rollouts=(good, bad))),
        scores_of(scorer, group(7, candidates=2)),
    )
    assert causes[0] == "" and causes[1].startswith(says) and none is None
    logp_TV = plain_logp(model, one.prompt.ids, good)
    close(scores.sampled_logp, logp_TV.gather(1, torch.tensor(good.ids)[:, None].long())[:, 0])
    assert [scores.id for scores in others] == ["7@0#0", "7@0#1"]


@pytest.mark.parametrize("where", ["embedding", "head"])
async def test_a_token_whose_log_prob_is_nan_costs_its_own_rollouts_in_one_batch(
    model, teacher, group, where
):
    """A NaN goes through a packed forward as far as it may: no rollout beside it is lost."""
    groups = [group(seed) for seed in range(12)]
    bad = int(groups[0].rollouts[0].ids[1])
    scorer = teacher(flush_s=0.05)
    module = getattr(scorer._model, f"get_{'in' if where == 'embedding' else 'out'}put_embeddings")
    with torch.no_grad():
        module().weight[bad] = torch.nan  # of the head: every log-prob is NaN as well
    answers = await asyncio.gather(*(scorer.score(one) for one in groups))
    for one, (causes, scores) in zip(groups, answers, strict=True):
        for rollout, cause, score in zip(one.rollouts, causes, scores, strict=True):
            reads = [*one.prompt.ids, *rollout.ids[:-1]]  # the last token is only looked up
            fails = bad in reads if where == "embedding" else True
            assert bool(cause) == fails == (score is None)
            if fails:
                assert "is not a finite log-prob" in cause and rollout.id in cause
            else:
                logp_TV = plain_logp(model, one.prompt.ids, rollout)
                expected = logp_TV.gather(1, torch.tensor(rollout.ids)[:, None].long())[:, 0]
                close(score.sampled_logp, expected)
    assert any(not any(causes) for causes, _ in answers) == (where == "embedding")


async def test_a_forward_that_raises_is_tried_rollout_by_rollout(
    model, teacher, group, forwards, monkeypatch
):
    scorer = teacher(flush_s=0.05)
    groups = [group(0), group(1, tokens=(4, 9)), group(2)]
    forward = causal_lm.hidden_states

    def hidden_states(model, ids_L, segment_lengths):
        if max(segment_lengths) > 9:
            raise RuntimeError("a kernel that has no such shape\nand says so at length")
        return forward(model, ids_L, segment_lengths)

    monkeypatch.setattr(causal_lm, "hidden_states", hidden_states)
    answers = await asyncio.gather(*(scorer.score(one) for one in groups))
    causes = [cause for each, _ in answers for cause in each]
    assert [bool(cause) for cause in causes] == [False] * 3 + [True] + [False] * 2
    assert causes[3] == (
        "1@0#1: a forward of 1 rollouts: RuntimeError: a kernel that has no such shape"
    )


@pytest.mark.parametrize(
    "needs", [NOTHING, Needs(teacher_topk=3, tail=True), Needs(teacher_at_student_ids=2)]
)
async def test_replicas_answer_the_probe_alike_whatever_company_it_has(teacher, group, needs):
    alone, busy = teacher(needs), teacher(needs)
    answer, _, again = await asyncio.gather(
        alone.probe(), busy.score(group(candidates=2)), busy.probe()
    )
    assert answer.dtype == np.float32 and np.isfinite(answer).all()
    np.testing.assert_allclose(again, answer, atol=1e-5)
    with torch.no_grad():
        busy._model.get_output_embeddings().weight[7] += 0.5
    assert np.abs(await busy.probe() - answer).max() > 1e-3
    with torch.no_grad():  # one token of the vocabulary is lost: that much is seen too
        busy._model.get_input_embeddings().weight[7] = torch.nan
    assert np.isnan(await busy.probe()).any()


async def test_a_caller_that_gives_up_does_not_stop_the_others(teacher, group):
    scorer = teacher()
    impatient, patient = (asyncio.create_task(scores_of(scorer, group(seed))) for seed in (0, 1))
    await asyncio.sleep(0)
    impatient.cancel()
    assert [scores.id for scores in await patient] == ["1@0#0", "1@0#1"]


async def test_what_nobody_waits_for_any_more_goes_through_no_forward(teacher, group, forwards):
    scorer = teacher(flush_s=0.3, batch_tokens=100)
    given_up = [asyncio.create_task(scorer.score(group(seed))) for seed in (0, 1)]
    await asyncio.sleep(0.01)
    for each in given_up:
        each.cancel()
    await scorer.score(group(2))
    assert [len(lengths) for lengths in forwards] == [2]


@torch.no_grad()
def test_greedy_is_the_likeliest_token_step_by_step(model, teacher):
    prompts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8], [9, 10, 11, 12, 13])]
    responses = asyncio.run(teacher().greedy(*prompts))
    for prompt, got in zip(prompts, responses, strict=True):
        ids = prompt.tolist()
        for token in got.tolist():
            assert token == model(torch.tensor([ids])).logits[0, -1, :REAL].argmax()
            ids.append(token)
        assert got.dtype == np.int32 and len(got) == 6


@torch.no_grad()
def test_greedy_stops_at_an_end_token(model, teacher):
    prompt = np.array([5, 6, 7], np.int32)
    free = asyncio.run(teacher().greedy(prompt))[0]
    stopped = asyncio.run(teacher(end=int(free[2])).greedy(prompt))[0]
    end = free.tolist().index(free[2]) + 1
    assert stopped.tolist()[:end] == free.tolist()[:end] and len(stopped) == end


def test_an_answer_that_ends_sooner_than_those_beside_it_has_nothing_behind_its_end(teacher):
    prompts = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8], [9, 10, 11, 12, 13])]
    free = asyncio.run(teacher().greedy(*prompts))
    end = int(free[0][0])
    together = asyncio.run(teacher(end=end).greedy(*prompts))
    alone = [asyncio.run(teacher(end=end).greedy(prompt))[0] for prompt in prompts]
    assert len({len(ids) for ids in alone}) > 1
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in alone]


@torch.no_grad()
def test_penalties_and_sampling_that_the_checkpoint_suggests_do_not_bend_greedy(
    model, teacher, tmp_path
):
    prompt = np.array([5, 6, 7], np.int32)
    plain = asyncio.run(teacher(longest=8).greedy(prompt))
    GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=5.0).save_pretrained(
        tmp_path
    )
    (bent,) = asyncio.run(teacher(longest=8).greedy(prompt))
    assert bent.tolist() == plain[0].tolist()


async def test_scores_are_the_same_after_a_greedy_run(teacher, group):
    scorer = teacher()
    (before, _) = await scores_of(scorer, group())
    await scorer.greedy(np.array([5, 6, 7], np.int32))
    (after, _) = await scores_of(scorer, group())
    np.testing.assert_allclose(after.sampled_logp, before.sampled_logp, atol=1e-5)


# the teacher has tokens that the student has not: a hole of the student's, and the ids from 30 on
MINE, WHOLE = [*range(4), *range(8, 30)], REAL


@pytest.fixture
def larger(model, tmp_path):
    """Makes a teacher with more tokens than the student, and padding besides."""

    def make(needs=NOTHING, **settings) -> TransformersTeacher:
        scoring = dict(vocabulary=runs(MINE), whole=((0, WHOLE),), temperature=0.7, eos_ids=(1,))
        config = TeacherConfig(model=str(tmp_path))
        return TransformersTeacher(scorer_settings(0, **scoring | settings), config, needs)

    return make


async def test_a_larger_teacher_has_candidates_of_the_student_s_normalised_over_all_of_its_own(
    model, larger, group
):
    needs = Needs(teacher_topk=3, teacher_entropy=True, tail=True)
    one = group()
    for rollout, got in zip(one.rollouts, await scores_of(larger(needs), one), strict=True):
        logits_TV = plain_logp(model, one.prompt.ids, rollout)[:, :WHOLE]
        logp_TV = logits_TV.log_softmax(-1)  # over what is no padding
        top = logp_TV[:, MINE].topk(3)
        close(got.topk_logp, top.values)
        assert got.topk_ids.tolist() == np.array(MINE)[top.indices].tolist()
        close(got.sampled_logp, logp_TV.gather(1, torch.tensor(rollout.ids).long()[:, None])[:, 0])
        close(got.tail_logp, outside(logp_TV, torch.tensor(got.topk_ids).long()))
        close(got.entropy, -(logp_TV.exp() * logp_TV).sum(-1))


@pytest.mark.parametrize("topk", [True, False], ids=["topk", "given"])
async def test_an_end_of_the_teacher_s_is_scored_as_the_student_s(model, larger, group, topk):
    """As by a teacher whose head has both rows exchanged: the student ends by 1, the teacher by
    31."""
    needs = Needs(tail=True, **{"teacher_topk" if topk else "teacher_at_student_ids": 3})
    one = group(candidates=3)
    for rollout in one.rollouts:
        rollout.ids[-1] = 1
        rollout.candidate_ids[:] %= WHOLE  # padding has no log-prob
        rollout.candidate_ids[:, 0] = 1
    theirs = runs([*(id for id in MINE if id != 1), 31])
    scorer = larger(needs, vocabulary=theirs, ends_as=((31, 1),))
    scores = await scores_of(scorer, one)
    for rollout, got in zip(one.rollouts, scores, strict=True):
        logp_TV = plain_logp(model, one.prompt.ids, rollout)[:, :WHOLE].log_softmax(-1)
        logp_TV[:, [1, 31]] = logp_TV[:, [31, 1]]
        close(got.sampled_logp, logp_TV.gather(1, torch.tensor(rollout.ids).long()[:, None])[:, 0])
        ids_TK = torch.tensor(got.topk_ids if topk else rollout.candidate_ids).long()
        logp_TK = got.topk_logp if topk else got.candidate_logp
        if topk:
            assert ids_TK.tolist() == np.array(MINE)[logp_TV[:, MINE].topk(3).indices].tolist()
        close(logp_TK, logp_TV.gather(1, ids_TK))


@torch.no_grad()
@pytest.mark.parametrize("ends_as", [(), ((31, 1),)], ids=["alike", "mapped"])
def test_answers_of_a_larger_teacher_are_of_the_student_s_tokens(model, larger, ends_as):
    head = model.get_output_embeddings().weight
    head[[5, 31, 35]] += 9  # of which only the end may be written
    others = {}
    if ends_as:
        others = dict(vocabulary=runs([*(id for id in MINE if id != 1), 31]), eos_ids=(31,))
    teacher = larger(ends_as=ends_as, **others)
    teacher._model.get_output_embeddings().weight.copy_(head)
    (answer,) = asyncio.run(teacher.greedy(np.array([8, 9], np.int32)))
    assert set(answer.tolist()) <= set(MINE)


def test_texts_that_end_a_response_end_the_teacher_s_own_too(forwards):
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in ("12+34=", "5+81=")]

    def answers(*stops: str) -> list[str]:
        settings = scorer_settings(24, max_new_tokens=12, stops=stops)
        teacher = TransformersTeacher(settings, TeacherConfig(model=str(TEACHER)), NOTHING)
        responses = asyncio.run(teacher.greedy(*prompts))
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]

    whole = answers()
    assert all(len(text) > 3 for text in whole)
    stop = whole[0][1:3]
    assert answers(stop)[0] == whole[0][:3]
