"""Responses of 16 thousand tokens: what they cost on the wire, and that no Python runs for each of
their tokens."""

import asyncio
import gc
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import cloudpickle

from async_opd.core.errors import ActorLost, CallFailed
from async_opd.core.ports import ScoredGroup
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.wire import Group, GroupMeta, Needs, Prompt, Rollout, Span, Verdict
from async_opd.driver.queue import Slots, TrajectoryQueue
from async_opd.maths.packing import plan
from async_opd.objectives import all_objectives
from async_opd.roles.learner.batch import TrainingBounds, Trajectory, pack
from async_opd.roles.models import causal_lm
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from async_opd.toy import STUDENT, TEACHER
from tests.objectives.test_contract import CASES
from tests.roles.teacher.settings import scorer_settings

LONG, P = 16_384, 700  # tokens of the response and of the prompt
WIDTH = 32  # of the teacher
NOTHING, LIKELIEST = Needs(), Needs(teacher_at_student_ids=8)
SAMPLED = Needs(teacher_at_student_ids=4, student_ids="sampled")
VERSIONS = 5  # under which a response is sampled: a lag bound of 4 trains on no more


def response(tokens: int, needs: Needs = NOTHING) -> Rollout:
    ends = [tokens * part // VERSIONS for part in range(VERSIONS + 1)]
    shape = (tokens, needs.teacher_at_student_ids)
    given = {"candidate_ids": np.full(shape, 7, np.int32)} if shape[1] else {}
    if shape[1] and needs.student_ids == "sampled":
        given["candidate_logp"] = np.full(shape, -2, np.float32)
    return Rollout(
        id="train-123456@0#0",
        ids=np.arange(tokens, dtype=np.int32) % 32,
        behaviour_logp=np.full(tokens, -1, np.float32),
        spans=tuple(
            Span(version=100 + at, start=ends[at], end=ends[at + 1]) for at in range(VERSIONS)
        ),
        truncated=False,
        **given,
    )


@pytest.fixture
def teacher(tiny_lm, tmp_path):
    """Makes a teacher of one small layer for the needs of an objective."""
    shape = dict(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    tiny_lm(**shape).save_pretrained(tmp_path)
    config = TeacherConfig(model=str(tmp_path), head_chunk_rows=LONG)
    return lambda needs: TransformersTeacher(scorer_settings(40), config, needs)


def messages(teacher: TransformersTeacher, needs: Needs, tokens: int):
    """All that is made of one trajectory and sent: by generator (twice), teacher and verifier."""
    rollout = response(tokens, needs)
    prompt = Prompt(id="train-123456@0", ids=np.zeros(P, np.int32), answer="12345")
    meta = GroupMeta(id=prompt.id, prompt_len=P, spans=(rollout.spans,), truncated=(False,))
    scores = teacher.score_rollouts([(prompt.ids, rollout)])
    return (
        meta,
        Group(prompt=prompt, rollouts=(rollout,)),
        scores,
        (Verdict(id=rollout.id, reward=1.0),),
    )


def sent(message) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """What Ray makes of a message: a pickle of protocol 5, and buffers beside it."""
    buffers = []
    return cloudpickle.dumps(message, protocol=5, buffer_callback=buffers.append), buffers


PRICED = {case.requirements(): type(case).__name__ for case in CASES} | {
    LIKELIEST: "likeliest",
    SAMPLED: "sampled",
}


@pytest.mark.parametrize("needs", PRICED, ids=PRICED.values())
def test_a_token_costs_no_more_than_its_declared_numbers(needs, teacher, monkeypatch):
    """Every message counts once, as Ray serialises it, however often it is then fetched: GroupMeta
    (to the driver), Group (to teacher, verifier, learner), Scores and Verdict (to the learner).
    Ray's own frame around it does not.

    Per token, at 4 bytes each: the id, its log-prob under behaviour and under the teacher, which
    every objective gets; the teacher's entropy and tail and, per id of the student's own, id, the
    teacher's log-prob and, where sampled, that under behaviour, where declared. 8 bytes for each of
    the teacher's top k. Nothing else grows with the response: 633 bytes, and 16 for each array of
    the student's own ids. One sample a prompt: the dearest case for that rest.
    """
    arrays = 2 + (needs.student_ids == "sampled") if needs.teacher_at_student_ids else 0
    numbers = 3 + needs.teacher_entropy + needs.tail + arrays * needs.teacher_at_student_ids
    rest = 633 + 16 * arrays + 4 * P
    total, scorer = 0, teacher(needs)
    # No size depends on what the model makes of the tokens, which takes most of the time.
    monkeypatch.setattr(
        causal_lm, "hidden_states", lambda model, ids_L, lengths: torch.zeros(len(ids_L), WIDTH)
    )
    for message in messages(scorer, needs, LONG):
        data, buffers = sent(message)
        total += len(data) + sum(buffer.raw().nbytes for buffer in buffers)
    assert LONG * 4 * numbers < total <= LONG * (4 * numbers + 8 * needs.teacher_topk) + rest


def test_every_objective_is_priced():
    assert {type(case) for case in CASES} == set(all_objectives().values())


def way(teacher: TransformersTeacher, needs: Needs, tokens: int) -> None:
    """A response's way from the teacher's forward over wire and queue into the learner's batch."""
    meta, group, scores, verdicts = (
        pickle.loads(data, buffers=buffers)
        for data, buffers in map(sent, messages(teacher, needs, tokens))
    )
    queue = TrajectoryQueue(
        groups_per_step=1,
        max_lag_steps=4,
        stale="mask",
        on_drop=lambda ticket, prompt, cause: None,
        slots=Slots(1),
        wait_s=60.0,
    )
    scored = ScoredGroup(
        ticket=1,
        prompt=group.prompt,
        meta=meta,
        group=group,
        scores=scores,
        verdicts=verdicts,
        samples=(0,),
        since=meta.oldest,
    )

    async def through() -> list[ScoredGroup]:
        queue.put(scored)
        return await queue.take(104)

    (ready,) = asyncio.run(through())
    assert plan([meta.tokens], ranks=1, tokens=P + LONG, width=8) == [[[0]]]
    trajectory = Trajectory(
        prompt=group.prompt,
        rollout=group.rollouts[0],
        scores=scores[0],
        verdicts=verdicts,
        group_lengths=meta.lengths,
    )
    bounds = TrainingBounds(max_lag_steps=4, stale="mask", truncated="train", cap=tokens)
    micro = pack([trajectory], bounds, live=104, device=torch.device("cpu"))
    assert ready.meta.lengths == (len(micro.targets_N),) == (tokens,)


def steps(call, *args) -> int:
    """Bytecode instructions of Python that `call` runs, those of everything it calls included."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # a finalizer in between would count too
    sys.settrace(trace)
    try:
        call(*args)
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def test_no_python_runs_for_each_token_from_teacher_to_learner(teacher):
    needs = Needs(
        teacher_topk=4, teacher_entropy=True, teacher_at_student_ids=2, student_ids="sampled"
    )
    scorer = teacher(needs)
    for tokens in (1_000, LONG):
        way(scorer, needs, tokens)  # what runs once only: imports, and the layout cached by lengths
    assert steps(way, scorer, needs, 1_000) == steps(way, scorer, needs, LONG) > 1_000


def test_one_comprehension_over_tokens_would_show():
    def loop(rollout: Rollout) -> None:
        np.array([id for id in rollout.ids], np.int32)

    more = LONG - 1_000
    assert steps(loop, response(LONG)) - steps(loop, response(1_000)) >= more


class Engine:
    """In the place of vLLM's: answers a generator with `output`, and a teacher with log-probs of
    every token."""

    def __init__(self, vocabulary: int = 0, output=None):
        self.model_config = SimpleNamespace(get_vocab_size=lambda: vocabulary)
        self.output = output

    async def collective_rpc(self, method: str, args: tuple = ()) -> None: ...

    async def add_request(
        self, id: str, prompt: dict, sampling, *, arrival_time: float, lora_request, priority: int
    ):
        assert type(prompt["prompt_token_ids"]) is list

        async def get() -> SimpleNamespace:
            return SimpleNamespace(outputs=[self.output])

        return SimpleNamespace(get=get)

    async def generate(self, prompt: dict, sampling, id: str):
        assert type(prompt["prompt_token_ids"]) is list
        given = sampling.prompt_logprob_token_ids
        yield SimpleNamespace(
            prompt_logprobs=flat(len(prompt["prompt_token_ids"]) - 1, 1 + sampling.prompt_logprobs),
            prompt_token_id_logprobs=None if given is None else -np.asarray(given, np.float32),
        )


def flat(rows: int, width: int):
    """Log-probs of ids 0, 1, … at each of `rows` tokens, as our part of vLLM's front end keeps
    them."""
    from async_opd.roles.models.vllm_columns import LogprobColumns

    columns = LogprobColumns()
    columns.append(np.tile(np.arange(width), (rows, 1)), np.full((rows, width), -1.0))
    return columns


@pytest.fixture
def around_vllm(monkeypatch):
    """Makes a generator, and a teacher without and one with padding among the likeliest, on engines
    of ours."""
    from async_opd.roles.rollout import engine_args, generator
    from async_opd.roles.teacher import vllm_teacher as teacher

    engine = Engine()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # restored, whatever is set
    for module in (engine_args, teacher):
        monkeypatch.setattr(
            module, "cpu_engine", lambda memory_gib, enforce_eager: {}
        )  # it is the engine's process that reads those
    monkeypatch.setattr(
        generator, "AsyncLLM", SimpleNamespace(from_engine_args=lambda args: engine)
    )
    with_padding = SimpleNamespace(from_engine_args=lambda args: Engine(vocabulary=9))
    monkeypatch.setattr(teacher, "AsyncLLM", with_padding)

    def make(needs: Needs):
        settings = GeneratorSettings(
            name="generator 0",
            model=str(STUDENT),
            eos_ids=(1,),
            max_prompt_tokens=P,
            vocabulary=((0, 24),),
            backend="gloo",
            seed=0,
        )
        rollout = RolloutConfig(max_new_tokens=LONG, enforce_eager=True)
        sampler = generator.RolloutGenerator(settings, rollout, needs)
        config = TeacherConfig(model=str(TEACHER), backend="vllm")
        asked = Needs(teacher_topk=4, teacher_at_student_ids=needs.teacher_at_student_ids)
        teachers = [
            teacher.VllmTeacher(scorer_settings(vocabulary, longest=P + LONG), config, asked)
            for vocabulary in (9, 2)
        ]
        return engine, sampler, teachers

    return make


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
@pytest.mark.parametrize(
    "needs", [NOTHING, LIKELIEST, SAMPLED], ids=["nothing", "likeliest", "sampled"]
)
def test_no_python_of_ours_runs_for_each_token_around_vllm(needs, around_vllm):
    from vllm.outputs import CompletionOutput, WeightVersionSpan

    engine, generator, teachers = around_vllm(needs)
    k = needs.teacher_at_student_ids

    async def through(prompt: Prompt) -> None:
        await generator.start()
        meta, group = await generator.generate(prompt)
        for teacher in teachers:
            _, (scores,) = await teacher.score(group)
            assert scores.topk_ids.shape == (*meta.lengths, 4)
            assert np.shape(scores.candidate_logp) == ((*meta.lengths, k) if k else ())

    def count(tokens: int) -> int:
        prompt = Prompt(id="a", ids=np.zeros(tokens, np.int32), answer="")
        output = CompletionOutput(
            0, "", [5] * tokens, None, flat(tokens, 1 + k), finish_reason="stop"
        )
        output.weight_versions = [WeightVersionSpan("3", 0, tokens)]
        engine.output = output
        return steps(asyncio.run, through(prompt))

    count(1_000)
    assert count(1_000) == count(LONG) > 100


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
def test_a_response_with_a_log_prob_that_is_none_fails_alone(around_vllm):
    from vllm.outputs import CompletionOutput, WeightVersionSpan

    def output(index: int):
        logp = flat(3, 1)
        if index == 1:
            logp.logp[2] = float("nan")
        made = CompletionOutput(index, "", [5] * 3, None, logp, finish_reason="stop")
        made.weight_versions = [WeightVersionSpan("3", 0, 3)]
        return made

    _, generator, _ = around_vllm(Needs())
    prompt = Prompt(id="a", ids=np.zeros(4, np.int32), answer="")
    meta, group = generator._group(prompt, [output(0), output(1)])
    assert meta.failures == ("", "a#1: behaviour_logp[2] = nan is not a finite log-prob <= 0")
    assert [rollout.failure for rollout in group.rollouts] == list(meta.failures)
    assert meta.lengths == (3, 3)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
def test_a_request_that_vllm_refuses_behind_a_pause_is_its_own_callers_error(around_vllm):
    from vllm.outputs import CompletionOutput, WeightVersionSpan

    engine, generator, _ = around_vllm(Needs())
    engine.output = CompletionOutput(0, "", [5] * 3, None, flat(3, 1), finish_reason="stop")
    engine.output.weight_versions = [WeightVersionSpan("3", 0, 3)]
    takes, resumed = engine.add_request, []

    async def add_request(id: str, prompt: dict, sampling, **others):
        if id.startswith("b"):
            raise ValueError("Token id 99 is out of vocabulary")
        return await takes(id, prompt, sampling, **others)

    async def resume_generation():
        resumed.append(True)

    engine.add_request, engine.resume_generation = add_request, resume_generation

    async def main():
        await generator._requests.pause()
        prompts = [Prompt(id=id, ids=np.zeros(4, np.int32), answer="") for id in "abc"]
        calls = [asyncio.create_task(generator.generate(prompt)) for prompt in prompts]
        await asyncio.wait_for(generator.resume(3), 10)
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)

    first, refused, last = asyncio.run(main())
    assert resumed and [meta.id for meta, _ in (first, last)] == ["a", "c"]
    assert str(refused) == "generator 0 refuses b: Token id 99 is out of vocabulary"
    assert isinstance(refused, CallFailed)


class Odd(Engine):
    """An engine of 9 logits that gives what it is asked of its first token: 1: NaN, 2: an error, 3:
    too few, 4: its death."""

    def __init__(self):
        super().__init__(vocabulary=9)
        self.asked = []

    async def generate(self, prompt: dict, sampling, id: str):
        from vllm.v1.engine.exceptions import EngineDeadError

        ids = prompt["prompt_token_ids"]
        self.asked.append(ids[-1])
        rows = flat(2 if ids[-1] == 3 else len(ids) - 1, 1 + sampling.prompt_logprobs)
        if ids[-1] == 1:
            rows.logp[-1, -1] = float("nan")
        if ids[-1] == 2:
            raise ValueError("it will not\nand says so at length")
        if ids[-1] == 4:
            raise EngineDeadError
        yield SimpleNamespace(prompt_logprobs=rows, prompt_token_id_logprobs=None)


def ending(*last: int) -> Group:
    """Rollouts of five tokens, of which these are the last."""
    rollouts = [
        Rollout(
            id=f"a#{sample}",
            ids=np.array([5, 5, 5, 5, id], np.int32),
            behaviour_logp=np.full(5, -1, np.float32),
            spans=(Span(version=0, start=0, end=5),),
            truncated=False,
        )
        for sample, id in enumerate(last)
    ]
    return Group(Prompt(id="a", ids=np.full(2, 6, np.int32), answer=""), tuple(rollouts))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
def test_what_vllm_cannot_score_costs_its_own_rollout_and_never_the_engine(around_vllm):
    _, _, (teacher, _) = around_vllm(Needs())
    teacher._engine = engine = Odd()
    causes, scores = asyncio.run(teacher.score(ending(5, 1, 2, 3, 9, -1, 7)))
    assert [score and score.id for score in scores] == ["a#0", *[None] * 5, "a#6"]
    assert [cause[:60] for cause in causes if cause] == [
        "a#1: topk_logp[19] = nan is not a finite log-prob <= 0",
        "a#2: scored by vLLM: it will not",
        causes[3][:60],
        "a#4: ids holds 9: must be < 9, the number of the teacher's l",
        "a#5: ids holds -1: must be < 9, the number of the teacher's ",
    ]
    assert "a#3: " in causes[3] and "\n" not in causes[3]
    assert engine.asked == [5, 1, 2, 3, 7]  # an id without a row would be its death
    with pytest.raises(ActorLost, match="its engine died"):
        asyncio.run(teacher.score(ending(5, 4)))
    probed = asyncio.run(teacher.probe())
    assert probed.shape[1] == 5 and np.isfinite(probed).any()
