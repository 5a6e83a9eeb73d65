"""vLLM's own server, on loopback, against the teacher that computes the same model exactly."""

import asyncio
import json
from contextlib import asynccontextmanager

import numpy as np
import pytest
from transformers import AutoTokenizer

from async_opd.core.errors import ActorLost, ConfigError
from async_opd.core.vocabulary import runs
from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.server import vllm_routes
from async_opd.roles.teacher.server.answers import Question
from async_opd.roles.teacher.server.served import look, refuse
from async_opd.roles.teacher.server.teacher import ServerTeacher
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from async_opd.toy import TEACHER
from tests.faults.served import Served
from tests.roles.teacher.settings import scorer_settings

KEY = "sk-of-the-test"
V, LONGEST = 24, 255
# as a checkpoint may have them, and which must not bend what is told of a prompt
BENT = '{"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.5, "top_k": 3, "min_p": 0.2}'
OPTIONS = (
    *f"--max-model-len {LONGEST + 1} --max-num-seqs 16 --max-num-batched-tokens 100".split(),
    *("--override-generation-config", BENT),
)


@asynccontextmanager
async def teaching(server: Served, needs: Needs, **settings):
    teacher = ServerTeacher(
        scorer_settings(V, **(dict(longest=LONGEST, max_new_tokens=12) | settings)),
        TeacherConfig(model=str(TEACHER)),
        needs,
        server.url,
        KEY,
        60.0,
    )
    try:
        yield teacher
    finally:
        await teacher.close()


def group(*lengths: int, prompt: int = 4) -> Group:
    random = np.random.default_rng(sum(lengths))
    return Group(
        prompt=Prompt(id="3@0", ids=random.integers(V, size=prompt, dtype=np.int32), answer=""),
        rollouts=tuple(
            Rollout(
                id=f"3@0#{i}",
                ids=random.integers(V, size=n, dtype=np.int32),
                behaviour_logp=np.full(n, -1, np.float32),
                spans=(Span(version=0, start=0, end=n),),
                truncated=False,
            )
            for i, n in enumerate(lengths)
        ),
    )


# every id, special ones among them; a response as long as there may be, in pieces of the server's
GROUPS = [group(24, 1, 7), group(LONGEST - 1, 100, prompt=1), group(5, prompt=200)]
CASES = {
    "sampled alone": (Needs(), {}),
    "likeliest": (Needs(teacher_topk=5, tail=True), {}),
    "as many as it gives": (Needs(teacher_topk=20), {}),
    "holes": (
        Needs(teacher_topk=4),
        dict(vocabulary=runs([0, 1, 2, 3, *range(9, 12), 15, 20]), whole=((0, V),)),
    ),
    "an end for another": (
        Needs(teacher_topk=4, tail=True),
        dict(vocabulary=runs(i for i in range(V) if i != 1), ends_as=((23, 1),)),
    ),
}


def ended(one: Group) -> Group:
    """With an end where there may be one: behind everything else."""
    for rollout in one.rollouts:
        rollout.ids[np.isin(rollout.ids, (1, 23))] = 2
        rollout.ids[-1] = 1
    return one


async def check(server: Served, needs: Needs, settings: dict) -> None:
    exact = TransformersTeacher(
        scorer_settings(V, **(dict(longest=LONGEST) | settings)),
        TeacherConfig(model=str(TEACHER)),
        needs,
    )
    async with teaching(server, needs, **settings) as teacher:
        await teacher.start()
        for one in GROUPS:
            if settings.get("ends_as"):
                one = ended(one)
            (causes, scores), (_, expected) = await asyncio.gather(
                teacher.score(one), exact.score(one)
            )
            assert causes == ("",) * len(one.rollouts)
            for got, right in zip(scores, expected, strict=True):
                assert got.id == right.id
                np.testing.assert_allclose(got.sampled_logp, right.sampled_logp, atol=1e-4)
                if needs.teacher_topk:
                    np.testing.assert_allclose(got.topk_logp, right.topk_logp, atol=1e-4)
                    # of two that are as likely either may be before the other
                    close = np.abs(np.diff(right.topk_logp, axis=1)).min(1) > 1e-3
                    assert close.mean() > 0.5
                    np.testing.assert_array_equal(
                        got.topk_ids[close, :-1], right.topk_ids[close, :-1]
                    )
                if needs.tail:
                    np.testing.assert_allclose(
                        np.exp(got.tail_logp), np.exp(right.tail_logp), atol=1e-4
                    )
        if not settings.get("ends_as"):  # the probe has ends where no response has them
            np.testing.assert_allclose(await teacher.probe(), await exact.probe(), atol=1e-4)


@pytest.mark.ray
@pytest.mark.timeout(900)
async def test_vllm_s_server_scores_as_the_model_does_dies_by_name_and_comes_back(tmp_path):
    server, logits = Served(tmp_path, KEY), Served(tmp_path, KEY)
    try:
        server.start(*OPTIONS)
        logits.start(*OPTIONS, "--logprobs-mode", "raw_logits")
        server.serves()
        served = await look(server.url, KEY, str(TEACHER), timeout_s=60)
        assert (served.longest, served.logits, served.most) == (LONGEST + 1, V, 20)
        for needs, settings in CASES.values():
            await check(server, needs, settings)
        await refuses(server, served)
        await responds(server)
        logits.serves()
        with pytest.raises(ConfigError, match=r"no log-probs|must be finite and <= 0") as e:
            await look(logits.url, KEY, str(TEACHER), timeout_s=60)
        assert str(e.value).endswith("serve it with --logprobs-mode raw_logprobs")

        needs = Needs(teacher_topk=5)
        async with teaching(server, needs) as teacher:
            await teacher.start()
            await teacher.check_health()
            scoring = [asyncio.create_task(teacher.score(GROUPS[1])) for _ in range(20)]
            await asyncio.sleep(0.2)
            server.kill()
            outcomes = await asyncio.gather(*scoring, return_exceptions=True)
            assert isinstance(outcomes[-1], ActorLost)
            for outcome in outcomes:  # what it has answered before stays
                assert isinstance(outcome, ActorLost) or outcome[0] == ("", "")
            with pytest.raises(ActorLost, match=f"teacher, {server.url}: cannot be reached: "):
                await teacher.check_health()

            flags = ("--max-logprobs", "-1", "--enable-scale-out")
            mode = ("--logprobs-mode", "processed_logprobs")  # the same, of a prompt
            server.start(*OPTIONS, *flags, *mode)
            server.serves()
            await teacher.check_health()
            served = await look(server.url, KEY, str(TEACHER), timeout_s=60)
            assert (served.logits, served.most) == (V, V)
            # its route is there, and says what it needs
            assert "VLLM_USE_V2_MODEL_RUNNER" in served.no_given_ids
            await check(server, *CASES["holes"])
    finally:
        server.kill()
        logits.kill()


async def refuses(server: Served, served) -> None:
    """What it cannot do is refused with the flag that would help."""
    settings = scorer_settings(V, longest=LONGEST)
    refuse(served, settings, Needs(teacher_topk=20))
    with pytest.raises(ConfigError, match=r"serve it with --max-logprobs 21$"):
        refuse(served, settings, Needs(teacher_topk=21))
    longer = scorer_settings(V, longest=LONGEST + 1)
    with pytest.raises(ConfigError, match=rf"serve it with --max-model-len {LONGEST + 2}$"):
        refuse(served, longer, Needs())
    with pytest.raises(ConfigError, match=r"does not do: .*answers 403.*--enable-scale-out$"):
        refuse(served, settings, Needs(teacher_at_student_ids=4))
    with pytest.raises(ConfigError, match=r"refuses the key that it is sent: .*answers 401"):
        await look(server.url, "sk-another", str(TEACHER), timeout_s=60)
    with pytest.raises(ConfigError, match=r"refuses a request without a key: .*answers 401"):
        await look(server.url, None, str(TEACHER), timeout_s=60)
    with pytest.raises(ConfigError, match=r"and not model 'toy': .*--served-model-name toy$"):
        await look(server.url, KEY, "toy", timeout_s=60)


async def responds(server: Served) -> None:
    """Its likeliest tokens are the model's own, ended by what ends them."""
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in ("12+34=", "5+81=")]
    most = dict(longest=LONGEST, max_new_tokens=12, eos_ids=(tokenizer.eos_token_id,))
    for others in ({}, dict(vocabulary=((0, 4), (9, V)), whole=((0, V),)), dict(stops=("6",))):
        exact = TransformersTeacher(
            scorer_settings(V, **(most | others)), TeacherConfig(model=str(TEACHER)), Needs()
        )
        async with teaching(server, Needs(), **(most | others)) as teacher:
            await teacher.start()
            responses = await teacher.greedy(*prompts)
        expected = await exact.greedy(*prompts)
        assert [r.tolist() for r in responses] == [e.tolist() for e in expected]


@pytest.mark.ray  # which imports much
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_its_route_for_tokens_is_read_as_it_is_written():
    """By vLLM's own classes, since it is enabled on GPUs only."""
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.scale_out.token_in_token_out import protocol
    from vllm.logprobs import Logprob
    from vllm.utils.serial_utils import numpy2base64

    class Written:
        """A client whose server is vLLM's classes."""

        who = "teacher"

        async def read(self, take, path, body, most_bytes):
            asked = protocol.GenerateRequest.model_validate(json.loads(json.dumps(body)))
            assert (asked.token_ids, asked.model) == ([5, 6, 7], "it")
            sampling = asked.sampling_params
            assert sampling.prompt_logprob_token_ids == [[1, 2], [3, 4]]
            assert (sampling.prompt_logprob_start, sampling.prompt_logprobs) == (0, 1)
            assert (sampling.max_tokens, sampling.temperature) == (1, 1)
            answer = protocol.GenerateTokensResponse(
                model="it",
                choices=[protocol.GenerateTokensChoice(index=0, token_ids=[1])],
                prompt_logprobs=[
                    None,
                    {6: Logprob(logprob=-3.0, rank=9), 2: Logprob(logprob=-0.5, rank=1)},
                    {7: Logprob(logprob=-0.25, rank=1)},
                ],
                prompt_token_id_logprobs=numpy2base64(np.array([[-1, -2], [-3, -4]], np.float32)),
            )
            return take(JSONResponse(content=answer.model_dump()).body)

    question = Question(
        model="it",
        names=frozenset({"it"}),
        ids=np.array([5, 6, 7], np.int32),
        tokens=2,
        k=1,
        logits=V,
        candidates=np.array([[1, 2], [3, 4]], np.int32),
    )
    read = await vllm_routes.read(Written(), question)
    assert read.sampled.tolist() == [-3.0, -0.25]
    assert read.ids.tolist() == [[2], [7]] and read.logp.tolist() == [[-0.5], [-0.25]]
    assert read.candidates.tolist() == [[-1, -2], [-3, -4]]
