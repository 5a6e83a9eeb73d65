"""Log-probs as columns: the same numbers as vLLM's own lists, through vLLM's own messages and front
end, and what they cost."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from async_opd.core.wire import Group, Needs, Prompt, Rollout, Span
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.toy import TEACHER
from tests.roles.teacher.settings import scorer_settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]
LONG, K, V = 16_384, 32, 150_000
MOST_S = 0.05  # of CPU for one long response, and that the loop may be deaf


def tensors(rows: int, width: int, ids=torch.int32):
    """What a model runner sends of so many tokens; ids are int64 of vLLM's second."""
    from vllm.v1.outputs import LogprobsTensors

    return LogprobsTensors(
        torch.randint(V, (rows, width), dtype=ids),
        -torch.rand(rows, width),
        torch.ones(rows, dtype=torch.int64),
    )


def received(**fields):
    """An output of a request, as its front end has it from the engine's process."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    sent = EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id="a", new_token_ids=[1], **fields)]
    )
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(sent)]
    return MsgpackDecoder(EngineCoreOutputs).decode(frames).outputs[0]


def both(flat: bool = True, **sampling):
    """vLLM's own processor of a request's log-probs, and ours."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.logprobs import LogprobsProcessor

    from async_opd.roles.models.vllm_columns import ColumnsProcessor

    request = SimpleNamespace(sampling_params=SamplingParams(flat_logprobs=flat, **sampling))
    return [kind.from_new_request(None, request) for kind in (LogprobsProcessor, ColumnsProcessor)]


def check(flat, columns, rows: int) -> None:
    ids = np.array(flat.token_ids, np.int32).reshape(rows, -1)
    logp = np.array(flat.logprobs, np.float32).reshape(rows, -1)
    assert columns.ids.dtype == np.int32 and columns.logp.dtype == np.float32
    assert len(columns) == rows
    assert np.array_equal(columns.ids, ids) and np.array_equal(columns.logp, logp)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["first", "second"])
@pytest.mark.parametrize(
    ("k", "width"), [(0, 1), (5, 6), (5, 9), (0, 4), (-1, 40)], ids=lambda n: f"{n}"
)
@pytest.mark.parametrize("chunks", [[1], [200], [1, 63, 1, 64, 200, 1]], ids=len)
def test_a_prompts_rows_are_vllms_across_its_pieces(chunks, k, width, ids):
    theirs, ours = both(prompt_logprobs=k, max_tokens=1)
    for rows in chunks:
        output = received(new_prompt_logprobs_tensors=tensors(rows, width, ids))
        theirs.update_from_output(output)
        ours.update_from_output(output)
    check(theirs.prompt_logprobs, ours.prompt_logprobs, sum(chunks))


@pytest.mark.parametrize(("k", "width"), [(0, 1), (4, 5), (4, 9)], ids=lambda n: f"{n}")
def test_a_responses_rows_are_vllms_one_or_several_a_step(k, width):
    theirs, ours = both(logprobs=k)
    rows = [1, 1, 3, 1, 2, *[1] * 300]
    for count in rows:
        lists = tensors(count, width).tolists()
        theirs.update_from_output(received(new_logprobs=lists))
        ours.update_from_output(received(new_logprobs=lists))
    check(theirs.logprobs, ours.logprobs, sum(rows))
    assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, rel=1e-6)


def test_a_request_that_does_not_ask_for_flat_ones_has_vllms_own():
    from vllm.v1.engine.logprobs import LogprobsProcessor

    _, ours = both(flat=False, logprobs=2)
    assert type(ours) is LogprobsProcessor
    _, without = both(max_tokens=1)
    without.update_from_output(received())
    assert without.logprobs is without.prompt_logprobs is None


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["first", "second"])
def test_a_long_response_costs_a_tenth_of_what_lists_do(ids):
    sent = tensors(LONG, 1 + K, ids)

    def seconds(each: int) -> float:
        """Of CPU, from the engine's frames to arrays."""
        taken = []
        for _ in range(3):
            processor = both(prompt_logprobs=K, max_tokens=1)[each]
            before = time.process_time()
            processor.update_from_output(received(new_prompt_logprobs_tensors=sent))
            flat = processor.prompt_logprobs
            np.array(flat.logprobs if each == 0 else flat.logp, np.float32)
            np.array(flat.token_ids if each == 0 else flat.ids, np.int32)
            taken.append(time.process_time() - before)
        return min(taken)

    theirs, ours = seconds(0), seconds(1)
    assert ours <= min(MOST_S, theirs / 5)


class Engine:
    """In the place of vLLM's: its front end, and the engine's messages of prompts of any length."""

    def __init__(self):
        from vllm.v1.engine.output_processor import OutputProcessor

        self.model_config = SimpleNamespace(get_vocab_size=lambda: V)
        self.front_end = OutputProcessor(None, log_stats=False)

    async def generate(self, prompt: dict, sampling, id: str):
        from vllm.v1.engine import EngineCoreRequest, FinishReason
        from vllm.v1.engine.output_processor import RequestOutputCollector

        tokens = prompt["prompt_token_ids"]
        request = EngineCoreRequest(
            request_id=id,
            external_req_id=id,
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        queue = RequestOutputCollector(sampling.output_kind, id)
        self.front_end.add_request(request, None, queue=queue)
        sent = tensors(len(tokens) - 1, 1 + sampling.prompt_logprobs)
        await asyncio.sleep(0)
        output = received(new_prompt_logprobs_tensors=sent, finish_reason=FinishReason.LENGTH)
        output.request_id = id
        self.front_end.process_outputs([output])
        yield await queue.get()


def test_the_loop_of_a_teacher_is_never_deaf(monkeypatch):
    """Four long responses of a group at once, through the real front end; in CPU time of the loop's
    thread, whatever else this machine does."""
    from async_opd.roles.teacher import vllm_teacher

    engine = Engine()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # restored, whatever is set
    monkeypatch.setattr(vllm_teacher, "cpu_engine", lambda memory_gib, enforce_eager: {})
    made = SimpleNamespace(from_engine_args=lambda args: engine)
    monkeypatch.setattr(vllm_teacher, "AsyncLLM", made)
    config = TeacherConfig(model=str(TEACHER), backend="vllm")
    needs = Needs(teacher_topk=K, tail=True)
    teacher = vllm_teacher.VllmTeacher(scorer_settings(V, longest=17_000), config, needs)
    rollouts = tuple(
        Rollout(
            id=f"a#{at}",
            ids=np.arange(LONG, dtype=np.int32),
            behaviour_logp=np.full(LONG, -1, np.float32),
            spans=(Span(version=0, start=0, end=LONG),),
            truncated=False,
        )
        for at in range(4)
    )
    group = Group(
        prompt=Prompt(id="a", ids=np.arange(500, dtype=np.int32), answer=""), rollouts=rollouts
    )

    async def deafest() -> float:
        """The most that the loop's thread worked between two chances of others."""
        worked, done = [], asyncio.Event()

        async def listen() -> None:
            while not done.is_set():
                before = time.thread_time()
                await asyncio.sleep(0)
                worked.append(time.thread_time() - before)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(listen())
            causes, scores = await teacher.score(group)
            done.set()
        assert causes == ("",) * 4
        assert all(each.topk_logp.shape == (LONG, K) for each in scores)
        return max(worked)

    asyncio.run(deafest())  # what is done once
    assert min(asyncio.run(deafest()) for _ in range(3)) <= MOST_S
