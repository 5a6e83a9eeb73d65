"""What is seen of a server before a run depends on it, what is refused, and what is told of ids of
the student's own and by SGLang."""

import asyncio
import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web
from msgspec.structs import replace as changed

from async_opd.core.errors import ActorLost, CallFailed, ConfigError
from async_opd.core.wire import Group, Needs
from async_opd.roles.teacher.server.served import Served, look, refuse
from tests.roles.teacher.server.asked import group, rows, scores_of, table, teaching
from tests.roles.teacher.server.stub import LOGP_VV, MODEL, V, serving
from tests.roles.teacher.settings import scorer_settings

SERVED = Served(
    url="http://there:8000",
    model=MODEL,
    names=frozenset({MODEL}),
    engine="vllm",
    longest=512,
    logits=V,
    most=20,
    no_given_ids="it is not enabled",
)


async def test_a_look_tells_what_a_server_serves():
    async with serving() as stub:
        served = await look(stub.url, None, MODEL, timeout_s=5)
        assert served == replace(SERVED, url=stub.url, no_given_ids=served.no_given_ids)
        assert "/inference/v1/generate answers 404" in served.no_given_ids
        stub.most = V
        assert (await look(stub.url, None, MODEL, timeout_s=5)).most == V
        assert len(stub.asked) == 6  # three a look


async def test_a_model_is_known_by_its_name_or_its_path_there_and_answers_by_any_of_its_names():
    cards = [
        {"id": "other", "root": "/models/other", "max_model_len": 512},
        {"id": "a", "root": "/models/it", "max_model_len": 512},
        {"id": "b", "root": "/models/it", "max_model_len": 512},
    ]

    async def models(stub, request):
        return web.json_response({"data": cards})

    async with serving(models=models) as stub:
        stub.model = "a"
        for name in ("a", "b", "/models/it"):
            served = await look(stub.url, None, name, timeout_s=5)
            assert served.names == {"a", "b"} and served.model == ("b" if name == "b" else "a")
        for name in ("c", "it", "/models/"):
            with pytest.raises(ConfigError, match=r"serves 'other', 'a', 'b', and not model "):
                await look(stub.url, None, name, timeout_s=5)


def followed(stub):
    stub.processed = True


def logits(stub):
    stub.logits = True


def bent(bend):
    def change(stub):
        stub.bend = bend

    return change


def nowhere_near(answer):
    """Logits that are all far below 0."""
    for row in rows(answer)[1:]:
        for entry in row.values():
            entry["logprob"] -= 30


def other_model(answer):
    answer["model"] = "gpt"


def no_logprobs(answer):
    del answer["choices"][0]["prompt_logprobs"]


def short_row(answer):
    for row in rows(answer)[1:]:
        for id in [*row][3:]:
            del row[id]


def nothing(stub):
    async def rule(stub, request, body):
        return web.json_response({"data": []})

    stub.rule = rule


def unbounded(stub):
    """Another server's way of refusing all ids."""

    async def rule(stub, request, body):
        if body["prompt_logprobs"] == -1:
            return web.json_response({"error": "prompt_logprobs must be >= 0"}, status=422)
        return None

    stub.rule = rule


REFUSED = {
    "they follow the temperature": (followed, r"follow the temperature .*raw_logprobs$"),
    "they are logits": (logits, r"(no log-probs|finite and <= 0); serve it with --logprobs-mode"),
    "logits below 0": (bent(nowhere_near), r"are none: the 16 likeliest of 40 ids have a prob"),
    "another model": (bent(other_model), r"answers as model 'gpt'; 'tables/forty' was asked for"),
    "no vLLM": (bent(no_logprobs), r"no prompt_logprobs$"),
    "fewer than it says": (bent(short_row), r"likeliest ids; 16 are asked for$"),
    "no completions": (
        nothing,
        r"not of the form asked for: Object missing required field `model`",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=[*REFUSED])
async def test_a_look_refuses_what_would_be_no_teacher(change, message):
    async with serving() as stub:
        change(stub)
        with pytest.raises(ConfigError, match=message) as e:
            await look(stub.url, None, MODEL, timeout_s=5, section="teachers.math")
        assert str(e.value).startswith(f"teachers.math.urls, {stub.url}: ")
        assert "\n" not in str(e.value)


async def test_a_server_that_names_no_bound_is_asked_for_what_is_needed():
    needs = Needs(teacher_topk=5)
    async with serving() as stub, teaching(stub, start=False) as teacher:
        unbounded(stub)
        served = await look(stub.url, None, MODEL, timeout_s=5)
        assert (served.most, served.logits) == (None, None)
        async with teaching(stub, needs) as teacher:
            (got,) = await scores_of(teacher, one := group(9))
        likeliest = np.argsort(-table(one, one.rollouts[0]))[:, :5]
        assert got.topk_ids.tolist() == likeliest.tolist()


async def test_a_look_at_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"^teacher.urls, http://127.0.0.1:1: cannot be reached"):
        await look("http://127.0.0.1:1", None, MODEL, timeout_s=20)


async def test_a_look_at_what_is_busy_or_says_nothing_in_time_is_refused():
    async def busy(stub, request):
        return web.json_response({}, status=503, headers={"Retry-After": "99"})

    async def silent(stub, request):
        await asyncio.sleep(300)

    for models, message in ((busy, "busy for too long"), (silent, "no answer in 0.5 s")):
        async with serving(models=models) as stub:
            with pytest.raises(ConfigError, match=rf"^teacher.urls, {stub.url}: {message}"):
                await look(stub.url, None, MODEL, timeout_s=0.5)


NEEDS = {
    "temperature": (dict(temperature=0.7), Needs(), r"rollout.temperature = 0.7: must be 1"),
    "entropy": ({}, Needs(teacher_entropy=True), r"needs the exact entropy, which no server"),
    "length": (dict(longest=512), Needs(), r"513 are needed, .*serve it with --max-model-len 513$"),
    "likeliest": ({}, Needs(teacher_topk=21), r"at most 20 ids a token.*--max-logprobs 21$"),
    "of the student's": (
        {},
        Needs(teacher_at_student_ids=4),
        r"does not do: it is not enabled: vLLM does on GPUs, served with --enable-scale-out$",
    ),
    "their number": ({}, Needs(teacher_at_student_ids=30), r"--max-logprobs 30$"),
    "vocabulary": (
        dict(whole=((0, 30), (35, 41))),
        Needs(),
        r"serves a model of 40 logits; the tokens of teacher.model have ids up to 40: it must be",
    ),
}


@pytest.mark.parametrize(("settings", "needs", "message"), NEEDS.values(), ids=[*NEEDS])
def test_what_a_server_cannot_serve_is_refused_by_name_and_flag(settings, needs, message):
    with pytest.raises(ConfigError, match=message) as e:
        refuse(SERVED, scorer_settings(V, **settings), needs)
    assert str(e.value).startswith("teacher.urls, http://there:8000: ")


def test_what_it_can_serve_is_not():
    able = replace(SERVED, no_given_ids="", longest=None, logits=None, most=None)
    for served in (SERVED, able):
        refuse(served, scorer_settings(V, longest=511), Needs(teacher_topk=20, tail=True))
    refuse(able, scorer_settings(V, longest=10**6), Needs(teacher_at_student_ids=99, tail=True))


async def test_a_teacher_refuses_at_its_start_what_its_server_cannot_do():
    async with serving() as stub:
        with pytest.raises(ConfigError, match=r"--max-logprobs 21$"):
            async with teaching(stub, Needs(teacher_topk=21)):
                pass


def with_candidates(one: Group, k: int) -> Group:
    random = np.random.default_rng(5)
    rollouts = [
        changed(r, candidate_ids=random.integers(V, size=(len(r.ids), k), dtype=np.int32))
        for r in one.rollouts
    ]
    return changed(one, rollouts=tuple(rollouts))


def npy(values: np.ndarray) -> str:
    """As vLLM's `numpy2base64` writes an array."""
    with io.BytesIO() as buffer:
        np.save(buffer, values, allow_pickle=False)
        return base64.b64encode(buffer.getvalue()).decode()


async def tokens(stub, request: web.Request) -> web.Response:
    """vLLM's route for tokens."""
    asked = await request.json()
    ids, sampling = np.array(asked["token_ids"]), asked["sampling_params"]
    start, wanted = sampling["prompt_logprob_start"], np.array(sampling["prompt_logprob_token_ids"])
    assert start + len(wanted) == len(ids) - 1
    assert (sampling["temperature"], sampling["max_tokens"]) == (1.0, 1)
    answer = stub.answer(ids.tolist(), sampling["prompt_logprobs"], 1.0)
    answer = {
        "model": stub.model,
        "choices": [{"index": 0, "token_ids": [3]}],
        "prompt_logprobs": rows(answer),
        "prompt_token_id_logprobs": npy(LOGP_VV[ids[start:-1, None], wanted].astype(np.float32)),
    }
    stub.bend(answer)
    return web.json_response(answer)


@pytest.mark.parametrize("k", [0, 3])
async def test_ids_of_the_student_s_own_are_scored_by_the_route_for_tokens(k):
    one = with_candidates(group(9, 1), 4)
    one.rollouts[0].ids[-1] = 1
    one.rollouts[0].candidate_ids[:, 0] = 1
    needs = Needs(teacher_topk=k, teacher_at_student_ids=4, tail=True)
    ends = dict(ends_as=((31, 1),), vocabulary=((0, 1), (2, V)))
    swap = np.arange(V)
    swap[[1, 31]] = 31, 1
    async with serving(tokens=tokens) as stub, teaching(stub, needs, **ends) as teacher:
        assert teacher._served.no_given_ids == ""
        scores = await scores_of(teacher, one)
    for rollout, got in zip(one.rollouts, scores, strict=True):
        before = np.concatenate([one.prompt.ids[-1:], swap[rollout.ids][:-1]])
        right = LOGP_VV[before[:, None], swap[rollout.candidate_ids]]
        np.testing.assert_allclose(got.candidate_logp, right, rtol=1e-6)
        assert got.sampled_logp[-1] == pytest.approx(LOGP_VV[before[-1], swap[rollout.ids[-1]]])
        left = np.maximum(1 - np.exp(got.candidate_logp).sum(1), 1e-6)
        np.testing.assert_allclose(np.exp(got.tail_logp), left, rtol=1e-4)
        assert (got.topk_ids is None) == (k == 0)


def array(values):
    def bend(answer):
        answer["prompt_token_id_logprobs"] = values if isinstance(values, str) else (npy(values))

    return bend


def gone(answer):
    answer["prompt_token_id_logprobs"] = None


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (gone, "are no array"),
        (array("!!"), "are no array"),
        (array("AAAA"), "are no array"),
        (array(np.zeros((9, 4), np.float64)), "are float64 (9, 4): must be float32 (9, 4)"),
        (array(np.zeros((8, 4), np.float32)), "are float32 (8, 4): must be float32 (9, 4)"),
        (array(np.full((9, 4), np.nan, np.float32)), "candidate id of token 0 is nan: must be"),
        (array(np.full((9, 4), -np.inf, np.float32)), "candidate id of token 0 is -inf: must"),
        (array(np.full((9, 4), 0.5, np.float32)), "candidate id of token 0 is 0.5: must be"),
    ],
)
async def test_what_is_no_answer_at_the_student_s_ids_is_named(bend, message):
    needs = Needs(teacher_at_student_ids=4)
    async with serving(tokens=tokens) as stub, teaching(stub, needs) as teacher:
        stub.bend = bend
        causes, scores = await teacher.score(with_candidates(group(9), 4))
    assert scores == (None,) and message in causes[0]


async def test_another_model_at_the_route_for_tokens_is_lost():
    needs = Needs(teacher_at_student_ids=4)
    async with serving(tokens=tokens) as stub, teaching(stub, needs) as teacher:
        stub.bend = other_model
        with pytest.raises(ActorLost, match="answers as model 'gpt'"):
            await teacher.score(with_candidates(group(9), 4))


def sglang(stub):
    stub.owner = "sglang"


@pytest.mark.parametrize("k", [0, 4])
async def test_sglang_tells_the_same_by_its_own_route(k):
    one, needs = group(30, 1), Needs(teacher_topk=k, tail=k > 0)
    ids = dict(vocabulary=((0, 33),), whole=((0, V),))
    async with serving() as stub:
        async with teaching(stub, needs, **ids) as teacher:
            expected = await scores_of(teacher, one)
        sglang(stub)
        async with teaching(stub, needs, **ids) as teacher:
            assert teacher._served.engine == "sglang"
            scores = await scores_of(teacher, one)
            assert {asked["logprob_start_len"] for asked in stub.asked} == {2}
            with pytest.raises(CallFailed, match="only vLLM's server responds"):
                await teacher.greedy(one.prompt.ids)
    for got, right in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(got.sampled_logp, right.sampled_logp)
        if k:
            np.testing.assert_array_equal(got.topk_ids, right.topk_ids)
            np.testing.assert_array_equal(got.topk_logp, right.topk_logp)
            np.testing.assert_array_equal(got.tail_logp, right.tail_logp)


def meta(change):
    def bend(answer):
        change(answer["meta_info"])

    return bend


def another_token(told):
    told["input_token_logprobs"][-1][1] += 1


def no_logp(told):
    told["input_token_logprobs"][-1][0] = None


def cached(told):
    """What was in the cache is not told of."""
    del told["input_token_logprobs"][1:4]


def top_gone(told):
    told["input_top_logprobs"][-1] = None


def top_short(told):
    told["input_top_logprobs"].pop()


def top_twice(told):
    told["input_top_logprobs"][-1][1] = told["input_top_logprobs"][-1][0]


@pytest.mark.parametrize(
    ("bend", "message"),
    [
        (meta(another_token), "lack token"),
        (meta(no_logp), "lack token"),
        (meta(cached), "log-probs of 6 tokens for 9"),
        (meta(top_gone), "token 8 has 0 likeliest ids; 12 are asked for"),
        (meta(top_short), "log-probs of 8 tokens for 9"),
        (meta(top_twice), "the same id twice"),
        (lambda answer: answer.clear(), "not of the form asked for"),
    ],
)
async def test_what_is_no_answer_of_sglang_s_is_named(bend, message):
    async with serving() as stub:
        sglang(stub)
        async with teaching(stub, Needs(teacher_topk=4)) as teacher:
            stub.bend = bend
            causes, scores = await teacher.score(group(9))
    assert scores == (None,) and message in causes[0]


async def test_sglang_s_temperature_is_looked_at_too():
    async with serving() as stub:
        sglang(stub)
        stub.processed = True
        with pytest.raises(ConfigError, match="follow the temperature"):
            await look(stub.url, None, MODEL, timeout_s=5)
