"""What a server says of a response, against the table that it is; and every answer that is none."""

import asyncio
import json

import numpy as np
import pytest
from aiohttp import web

from async_opd.core.errors import ActorLost, CallFailed, ConfigError, TimedOut, WireError
from async_opd.core.vocabulary import runs
from async_opd.core.wire import Group, Needs, Prompt
from tests.roles.teacher.server.asked import group, rows, scores_of, table, teaching
from tests.roles.teacher.server.stub import LOGP_VV, MODEL, V, serving


@pytest.mark.parametrize(("k", "tail"), [(0, False), (1, True), (5, True), (20, False)])
async def test_scores_are_those_of_the_table(k, tail):
    one = group(60, 1, 7)
    async with serving() as stub, teaching(stub, Needs(teacher_topk=k, tail=tail)) as teacher:
        causes, scores = await teacher.score(one)
    assert causes == ("", "", "")
    for rollout, got in zip(one.rollouts, scores, strict=True):
        logp_TV = table(one, rollout)
        assert got.id == rollout.id
        sampled = np.take_along_axis(logp_TV, rollout.ids[:, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(got.sampled_logp, sampled, rtol=1e-6)
        if k:
            likeliest = np.argsort(-logp_TV)[:, :k]
            assert got.topk_ids.tolist() == likeliest.tolist()
            logp_TK = np.take_along_axis(logp_TV, likeliest, 1)
            np.testing.assert_allclose(got.topk_logp, logp_TK, rtol=1e-6)
        else:
            assert got.topk_ids is None and got.topk_logp is None
        if tail:
            np.testing.assert_allclose(np.exp(got.tail_logp), 1 - np.exp(logp_TK).sum(1), atol=1e-5)
        else:
            assert got.tail_logp is None
    assert all(body["temperature"] == 1 and body["max_tokens"] == 1 for body in stub.asked)
    assert {body["prompt_logprobs"] for body in stub.asked} == {k}  # the head has no other ids


async def test_it_reads_the_prompt_as_the_teacher_does_and_the_reference_as_the_student():
    one = group(4)
    shown = np.array([9, 8, 7, 6], np.int32)
    prompt = Prompt(id="7@0", ids=one.prompt.ids, answer="", teacher_ids=shown)
    one = Group(prompt=prompt, rollouts=one.rollouts)
    for as_student, ids in ((False, shown), (True, one.prompt.ids)):
        async with serving() as stub, teaching(stub, as_student=as_student) as teacher:
            await teacher.score(one)
            assert stub.asked[0]["prompt"] == [*ids.tolist(), *one.rollouts[0].ids.tolist()]


# a vocabulary with holes; every second of its ids only; one in which padding is all that it lacks
@pytest.mark.parametrize(
    "ids", [[*range(5, 12), *range(20, 31)], range(0, V, 2), range(33)], ids=["holes", "2nd", "pad"]
)
async def test_ids_that_the_student_has_not_are_no_candidates_and_have_their_share(ids):
    one, k = group(30, real=5), 6
    settings = dict(vocabulary=runs(ids), whole=runs(range(36)))
    async with (
        serving() as stub,
        teaching(stub, Needs(teacher_topk=k), **settings) as teacher,
    ):
        stub.most = V
        await teacher.start()
        (got,) = await scores_of(teacher, one)
    logp_TV = table(one, one.rollouts[0])
    masked = np.full_like(logp_TV, -np.inf)
    masked[:, list(ids)] = logp_TV[:, list(ids)]
    likeliest = np.argsort(-masked)[:, :k]
    assert got.topk_ids.tolist() == likeliest.tolist()
    np.testing.assert_allclose(got.topk_logp, np.take_along_axis(logp_TV, likeliest, 1), rtol=1e-6)


async def test_where_too_few_of_the_likeliest_are_the_student_s_the_flag_is_named():
    rare = np.argsort(LOGP_VV.sum(0))[:9].tolist()
    needs, settings = Needs(teacher_topk=8), dict(vocabulary=runs(rare), whole=runs(range(V)))
    one = group(40)
    async with serving() as stub, teaching(stub, needs, start=False, **settings) as teacher:
        with pytest.raises(CallFailed, match=r"of its 20 likeliest ids fewer than 8.*--max-logp"):
            await teacher.start()
        causes, scores = await teacher.score(one)
        assert scores == (None,) and "--max-logprobs" in causes[0] and causes[0].startswith("7@0#0")
        stub.most = V
        await teacher.start()
        await scores_of(teacher, one)


async def test_an_end_that_is_read_as_another_is_so_in_what_is_sent_and_in_what_is_told():
    one = group(20)
    one.rollouts[0].ids[-1] = 1
    settings = dict(ends_as=((31, 1),), vocabulary=runs([i for i in range(V) if i != 1]))
    async with serving() as stub, teaching(stub, Needs(teacher_topk=5), **settings) as teacher:
        (got,) = await scores_of(teacher, one)
        sent = stub.asked[0]["prompt"]
    swap = np.arange(V)
    swap[[1, 31]] = 31, 1
    assert sent == [*one.prompt.ids.tolist(), *swap[one.rollouts[0].ids].tolist()]
    assert sent[-1] == 31
    logp_TV = LOGP_VV[[sent[2], *sent[3:-1]]]
    assert got.sampled_logp[-1] == pytest.approx(logp_TV[-1, 31], rel=1e-6)
    logp_TV[:, 1] = -np.inf  # the teacher's end of this id is none of the student's
    assert got.topk_ids.tolist() == swap[np.argsort(-logp_TV)[:, :5]].tolist()


def first(row):
    return next(iter(row))


def short(answer):
    rows(answer).pop()


def long(answer):
    rows(answer).append(rows(answer)[-1])


def no_rows(answer):
    answer["choices"][0]["prompt_logprobs"] = None


def not_sampled(answer):
    del rows(answer)[-1][first(rows(answer)[-1])]


def few(answer):
    row = rows(answer)[-1]
    del row[[*row][-1]]
    del row[[*row][-1]]


def unknown_id(answer):
    row = rows(answer)[-1]
    row["40"] = row.pop([*row][-1])


def negative_id(answer):
    row = rows(answer)[-1]
    row["-1"] = row.pop([*row][-1])


def endless_id(answer):
    row = rows(answer)[-1]
    row["9" * 25] = row.pop([*row][-1])


def no_id(answer):
    row = rows(answer)[-1]
    row["x"] = row.pop([*row][-1])


def null_row(answer):
    rows(answer)[-1] = None


def two(answer):
    answer["choices"] *= 2


def none(answer):
    answer["choices"] = []


def sure(answer):
    for row in rows(answer)[1:]:
        for entry in row.values():
            entry["logprob"] = -0.1


def said(value, place=0):
    """The log-prob of the sampled token, or of another beside it, of the last token."""

    def bend(answer):
        row = rows(answer)[-1]
        row[[*row][place]]["logprob"] = value

    return bend


def beyond(answer):
    said(10**400)(answer)


def other(answer):
    for key in list(answer):
        del answer[key]
    answer["object"] = "error"


BENT = {
    "a row is missing": (short, "log-probs of 22 tokens for 23"),
    "a row too many": (long, "log-probs of 24 tokens for 23"),
    "no log-probs": (no_rows, "no prompt_logprobs"),
    "the sampled token is missing": (not_sampled, "lack token"),
    "too few of the likeliest": (few, "likeliest ids; 4 are asked for|lack token"),
    "an id outside of the head": (unknown_id, "id is 40: must be < 40"),
    "an id below 0": (negative_id, "id is -1: must be < 40"),
    "an id beyond all integers": (endless_id, "not of the form asked for|must be < 40"),
    "no id": (no_id, "not of the form asked for"),
    "null for a row": (null_row, "not of the form asked for"),
    "two choices": (two, "2 choices"),
    "no choice": (none, "0 choices"),
    "no distribution": (sure, "add up to 3.62"),
    "NaN": (said(float("nan")), "not of the form asked for: JSON is malformed"),
    "inf": (said(float("inf")), "not of the form asked for: JSON is malformed"),
    "null": (said(None), "not of the form asked for"),
    "text": (said("-1.0"), "not of the form asked for"),
    "a number beyond all": (beyond, "Number out of range"),
    "a huge number": (said(-1e308), "no finite|must be finite|finite log-prob"),
    "above 0": (said(0.3), "is 0.3: must be finite and <= 0"),
    "above 0, of another id": (said(2.0, 1), "is 2: must be finite and <= 0"),
    "what vLLM writes for -inf": (said(-9999.0), "is -9999: must be finite"),
    "another object": (other, "not of the form asked for"),
}


@pytest.mark.parametrize(("bend", "message"), BENT.values(), ids=[*BENT])
async def test_what_is_no_answer_is_named_and_never_a_score(bend, message):
    """Of one rollout, whatever the others of its group get."""
    one = group(20, 20)

    async with serving() as stub, teaching(stub, Needs(teacher_topk=4)) as teacher:
        bad = [*one.prompt.ids.tolist(), *one.rollouts[1].ids.tolist()]

        async def rule(stub, request, body):
            answer = stub.answer(body["prompt"], 4, 1.0)
            if body["prompt"] == bad:
                bend(answer)
            return web.Response(text=json.dumps(answer), content_type="application/json")

        stub.rule = rule
        causes, scores = await teacher.score(one)
    assert causes[0] == "" and scores[0] is not None
    assert scores[1] is None
    assert causes[1].startswith("7@0#1: ") and "\n" not in causes[1] and len(causes[1]) < 400
    assert any(part in causes[1] for part in message.split("|")), causes[1]


@pytest.mark.parametrize("cut", [1, 50, 2000])
async def test_json_that_ends_early_is_no_answer(cut):
    async def rule(stub, request, body):
        text = json.dumps(stub.answer(body["prompt"], 4, 1.0))
        return web.Response(text=text[:-cut], content_type="application/json")

    async with serving() as stub, teaching(stub, Needs(teacher_topk=4)) as teacher:
        stub.rule = rule
        causes, scores = await teacher.score(group(20))
    assert scores == (None,) and "not of the form asked for: Input data was truncated" in causes[0]


async def test_an_answer_without_an_end_is_given_up():
    async def rule(stub, request, body):
        response = web.StreamResponse()
        await response.prepare(request)
        with pytest.raises(ConnectionError):
            while True:
                await response.write(b'{"a":"' + b"x" * (1 << 20))
        raise web.HTTPGone

    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = rule
        causes, scores = await teacher.score(group(2))
    assert scores == (None,) and "answers more than" in causes[0]


def page(status: int, text: str, kind: str = "application/json", **headers: str):
    async def rule(stub, request, body):
        headers_ = {key.replace("_", "-"): value for key, value in headers.items()}
        return web.Response(status=status, text=text, content_type=kind, headers=headers_)

    return rule


WHOLE = {
    "a page": (page(200, "<html>hello</html>", "text/html"), "answers no JSON, but a page of HTML"),
    "text": (page(200, "it works!", "text/plain"), "answers no JSON, but it works!"),
    "nothing": (page(200, ""), "answers no JSON, but nothing"),
    "an error page": (page(502, "<h1>Bad</h1>", "text/html"), "answers 502: a page of HTML"),
    "an error": (page(500, '{"error": {"message": "boom"}}'), "answers 500: boom"),
    "long": (page(500, "x" * 5000), "answers 500: " + "x" * 200 + "…"),
    "lines": (page(500, "a\n\nb\x00"), "answers 500: a b"),
    "no key": (page(401, '{"error": "Unauthorized"}'), "refuses the key that it is sent"),
    "not yours": (page(403, "no"), "/v1/completions answers 403: no"),
    "elsewhere": (page(307, "", Location="http://127.0.0.1:9/x"), "sends elsewhere, which is not"),
}


@pytest.mark.parametrize(("rule", "message"), WHOLE.values(), ids=[*WHOLE])
async def test_what_is_wrong_with_a_server_fails_the_call_so_that_another_is_asked(rule, message):
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = rule
        with pytest.raises(CallFailed) as e:
            await teacher.score(group(2, 3))
    assert message in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).startswith(f"teacher, {stub.url}: ")


async def test_a_request_that_is_refused_fails_alone():
    one = group(2, 3)

    async def rule(stub, request, body):
        if len(body["prompt"]) == 6:
            error = {"error": {"message": "too long\nand more", "code": 400}}
            return web.json_response(error, status=400)
        return None

    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = rule
        causes, scores = await teacher.score(one)
    assert causes[0] == "" and scores[0] is not None and scores[1] is None
    assert (
        causes[1] == f"7@0#1: teacher, {stub.url}: /v1/completions answers 400: too long and more"
    )


async def test_ids_that_the_model_has_no_logits_for_are_not_sent():
    one = group(2, 3)
    one.rollouts[1].ids[0] = V
    async with serving() as stub, teaching(stub, real=V - 7, whole=((0, V - 7),)) as teacher:
        causes, _ = await teacher.score(one)
        assert causes[0] == "" and "ids holds 40: must be < 40" in causes[1]
        assert len(stub.asked) == 1


async def test_another_model_is_a_member_that_is_lost():
    async with serving() as stub, teaching(stub) as teacher:
        stub.model = "tables/other"
        with pytest.raises(ActorLost, match="answers as model 'tables/other'; 'tables/forty' was"):
            await teacher.score(group(2))
        with pytest.raises(
            ConfigError, match="serves 'tables/other', and not model 'tables/forty'"
        ):
            await teacher.start()


async def test_a_server_that_knows_the_model_no_more_is_lost():
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = page(404, '{"error": {"message": "The model `x` does not exist."}}')
        with pytest.raises(ActorLost, match=r"answers 404: The model `x` does not exist.$"):
            await teacher.score(group(2))


RAW = {
    "nested too deep": b'{"x":' + b"[" * 200_000,
    "of no encoding": b'{"model":"\xff","choices":[]}',
    "a list": b"[]",
    "a row nested too deep": b'{"model":"tables/forty","choices":[{"prompt_logprobs":[null,'
    + b'{"1":{"x":' * 50_000,
}


@pytest.mark.parametrize("content", RAW.values(), ids=[*RAW])
async def test_bytes_that_are_no_answer_are_named(content):
    async def rule(stub, request, body):
        return web.Response(body=content, content_type="application/json")

    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = rule
        causes, scores = await teacher.score(group(2))
        assert scores == (None,) and "is not of the form asked for: " in causes[0]
        stub.rule = page(500, "[" * 200_000)
        with pytest.raises(CallFailed, match=r"answers 500: \[\[\["):
            await teacher.score(group(2))


async def test_a_server_that_does_not_repeat_itself_is_refused():
    """One URL for two models, say."""

    async def rule(stub, request, body):
        if len(body["prompt"]) < 30:  # not of the probe
            return None
        answer = stub.answer(body["prompt"], body["prompt_logprobs"], 1.0)
        for row in rows(answer)[1:]:
            for entry in row.values():
                entry["logprob"] -= 0.4 * (
                    sum(len(asked["prompt"]) > 30 for asked in stub.asked) > 4
                )
        return web.json_response(answer)

    async with serving() as stub, teaching(stub, start=False) as teacher:
        stub.rule = rule
        with pytest.raises(CallFailed, match=r"answers the same probe in two ways: .* nats apart"):
            await teacher.start()


async def test_the_probe_is_what_replicas_of_other_backends_give():
    needs = Needs(teacher_topk=3)
    async with serving() as stub, teaching(stub, needs) as teacher:
        answer = await teacher.probe()
        assert answer.shape == (4 * 32, 1 + 3) and np.isfinite(answer).all()
        np.testing.assert_array_equal(answer, await teacher.probe())


async def test_a_slow_server_is_late_by_name_and_within_its_time():
    async def rule(stub, request, body):
        await asyncio.sleep(300)

    async with serving() as stub, teaching(stub, within_s=0.3) as teacher:
        stub.rule = rule
        with pytest.raises(TimedOut, match=r"teacher, http://127.0.0.1:\d+: no answer in 0.3 s"):
            await teacher.score(group(2, 3))


def responding(*ids: int | str, model: str = MODEL):
    async def rule(stub, request, body):
        answer = {"model": model, "choices": [{"index": 0, "token_ids": [*ids]}]}
        return web.json_response(answer)

    return rule


async def test_a_response_of_its_own_is_asked_for_by_ids_and_of_the_student_s_alone():
    settings = dict(vocabulary=((0, 3), (30, 33)), whole=((0, V),), eos_ids=(31,), stops=("stop",))
    prompts = np.array([4, 5], np.int32), np.array([6], np.int32)
    async with serving() as stub, teaching(stub, ends_as=((31, 1),), **settings) as teacher:
        stub.rule = responding(2, 0, 31)
        responses = await teacher.greedy(*prompts)
        assert [r.tolist() for r in responses] == [[2, 0, 1]] * 2 and responses[0].dtype == np.int32
        assert [body["prompt"] for body in stub.asked] == [[4, 5], [6]]
        for body in stub.asked:
            assert (body["temperature"], body["max_tokens"]) == (0, 8)
            assert (body["stop"], body["stop_token_ids"]) == (["stop"], [31])
            assert body["allowed_token_ids"] == [0, 1, 2, 30, 31, 32]


@pytest.mark.parametrize("ids", [(), (V,), (-1,), ("x",)], ids=["none", "beyond", "below", "text"])
async def test_what_is_no_response_is_refused(ids):
    async with serving() as stub, teaching(stub) as teacher:
        stub.rule = responding(*ids)
        with pytest.raises(WireError, match=rf"^teacher, {stub.url}: its answer"):
            await teacher.greedy(np.array([4, 5], np.int32))


async def test_a_response_takes_longer_than_a_score_may():
    async def rule(stub, request, body):
        await asyncio.sleep(0.6)
        return await responding(2)(stub, request, body)

    async with serving() as stub, teaching(stub, within_s=0.3) as teacher:
        stub.rule = rule
        (response,) = await teacher.greedy(np.array([4, 5], np.int32))
        assert response.tolist() == [2]
