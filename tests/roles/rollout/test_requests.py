"""What enters an engine, and under which salt, around pauses and updates; over an engine that
answers when it is told to."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from async_opd.core.errors import CallFailed, OverAge

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::Warning"),  # those of importing vLLM
]


class Collector(asyncio.Queue):
    request_id = ""


class Engine:
    """Holds what is added until `finish`; `started` requests have a token of a version."""

    def __init__(self):
        self.log: list[str] = []
        self.salts: dict[str, str | None] = {}  # by id without its number, the last
        self.turns: dict[str, float] = {}  # what the engine goes by, of those of one priority
        self.slow = asyncio.Event()
        self.slow.set()
        self.output_processor = SimpleNamespace(request_states={})
        self._collectors: dict[str, Collector] = {}

    async def add_request(
        self, id: str, prompt: dict, sampling, *, arrival_time: float, lora_request, priority: int
    ) -> Collector:
        assert sampling.n == 1
        assert prompt["type"] == "token"  # vLLM renders no such prompt in a thread
        await self.slow.wait()
        if id.startswith("refused"):
            raise ValueError("it does not suit")
        collector = Collector()
        collector.request_id = id
        self._collectors[id] = collector
        self.output_processor.request_states[id] = SimpleNamespace(weight_version_starts=[])
        self.log.append(id)
        self.turns[id] = arrival_time
        self.salts[id.rpartition("/")[0]] = prompt.get("cache_salt")
        return collector

    async def abort(self, ids, internal: bool) -> None:
        assert internal
        for id in [ids] if isinstance(ids, str) else ids:
            self.log.append(f"-{id}")
            self._end(id, "abort")

    async def resume_generation(self) -> None:
        self.log.append("runs")

    def started(self, version: int, *ids: str) -> None:
        for id in ids:
            self.output_processor.request_states[id].weight_version_starts = [(f"{version}", 0)]

    def finish(self, *ids: str) -> None:
        for id in ids:
            self._end(id, "length")

    def _end(self, id: str, reason: str) -> None:
        if self.output_processor.request_states.pop(id, None):
            output = SimpleNamespace(finish_reason=reason, index=0, id=id)
            self._collectors[id].put_nowait(SimpleNamespace(outputs=[output]))


def requests_of(engine: Engine, *, keeps_kv: bool = True):
    from async_opd.roles.rollout.requests import Requests

    return Requests(engine, "generator 0", keeps_kv=keeps_kv)


def asked(requests, id: str, n: int = 1) -> asyncio.Task:
    from vllm.sampling_params import SamplingParams

    call = requests.run(id, np.arange(3, dtype=np.int32), SamplingParams(n=n))
    return asyncio.ensure_future(call)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_response_is_a_request_of_its_own_and_they_come_in_order():
    engine = Engine()
    call = asked(requests_of(engine), "a", n=3)
    await settled()
    assert engine.log == ["a/0", "a/1", "a/2"]
    engine.finish("a/2", "a/0", "a/1")
    assert [(output.index, output.id) for output in await call] == [
        (0, "a/0"),
        (1, "a/1"),
        (2, "a/2"),
    ]
    assert engine.log == ["a/0", "a/1", "a/2"]  # there was nothing to be aborted


async def test_what_is_on_its_way_when_a_pause_begins_is_inside_before_it_and_gets_the_next_salt():
    engine = Engine()
    requests = requests_of(engine)
    engine.slow.clear()
    call = asked(requests, "a", n=2)
    await settled()
    pausing = asyncio.ensure_future(requests.pause())
    await settled()
    assert not pausing.done()
    engine.slow.set()
    await pausing
    assert engine.log == ["a/0"] and engine.salts == {"a": "0"}  # the second is held back
    await requests.renew(oldest=0)
    await settled()
    assert engine.log == ["a/0", "-a/0"]
    await requests.resume(0)
    assert engine.log == ["a/0", "-a/0", "runs", "a/1", "a/2"] and engine.salts == {"a": "1"}
    engine.finish("a/1", "a/2")
    assert [output.id for output in await call] == ["a/1", "a/2"]


async def test_what_enters_anew_keeps_its_turn_before_what_came_later():
    engine = Engine()
    requests = requests_of(engine)
    old = asked(requests, "z", n=2)
    await settled()
    engine.started(0, "z/0")
    newer = []
    for update in range(2):
        await requests.pause()
        newer.append(asked(requests, f"{update}"))
        await settled()
        await requests.renew(oldest=0)
        await requests.resume(0)
        await settled()
    inside = engine.output_processor.request_states
    in_turn = sorted(inside, key=engine.turns.get)
    assert [id.partition("/")[0] for id in in_turn] == ["z", "z", "0", "1"]
    engine.finish(*inside)
    await asyncio.gather(old, *newer)


async def test_one_that_ends_as_the_update_comes_is_not_sampled_again():
    engine = Engine()
    requests = requests_of(engine)
    call = asked(requests, "a")
    await settled()
    engine.started(0, "a/0")
    await requests.pause()
    engine.finish("a/0")  # its caller has not run yet
    await requests.renew(oldest=0)
    await requests.resume(0)
    assert [output.id for output in await call] == ["a/0"]
    assert engine.log == ["a/0", "runs"]


@pytest.mark.parametrize("keeps_kv", [True, False])
async def test_where_kv_is_kept_what_has_no_token_enters_anew_and_what_has_some_goes_on(keeps_kv):
    engine = Engine()
    requests = requests_of(engine, keeps_kv=keeps_kv)
    call, new = asked(requests, "a", n=2), None
    await settled()
    engine.started(0, "a/0")
    await requests.pause()
    new = asked(requests, "b")
    await settled()
    await requests.renew(oldest=0)
    await requests.resume(0)
    if keeps_kv:
        assert engine.log[2:] == ["-a/1", "runs", "a/2", "b/3"]
        assert engine.salts == {"a": "1", "b": "1"}
    else:
        assert engine.log[2:] == ["runs", "b/2"]
        assert engine.salts == {"a": None, "b": None}
    engine.finish(*engine.output_processor.request_states)
    assert [output.index for output in await call] == [0, 1]
    await new


async def test_where_calls_are_expected_the_engine_runs_behind_them_in_the_order_of_their_ids():
    engine = Engine()
    requests = requests_of(engine)
    await requests.pause()
    resuming = asyncio.ensure_future(requests.resume(3))
    calls = [asked(requests, id) for id in ("c", "a")]
    await settled()
    assert not resuming.done()
    calls += [asked(requests, "refused"), asked(requests, "b", n=2)]
    await resuming
    assert engine.log == ["a/0", "b/1", "b/2", "c/3", "runs"]
    engine.finish("a/0", "b/1", "b/2", "c/3")
    _, _, refused, _ = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(refused, CallFailed)
    assert f"{refused}" == "generator 0 refuses refused: it does not suit"


async def test_a_call_with_an_over_age_token_ends_whole_but_no_evaluation_does():
    engine = Engine()
    requests = requests_of(engine)
    old, fresh = asked(requests, "old", n=3), asked(requests, "fresh")
    evaluation = asked(requests, "evaluation/e")
    await settled()
    engine.started(2, "old/0", "evaluation/e/4")
    engine.started(3, "old/1", "fresh/3")
    await requests.pause()
    await requests.renew(oldest=3)
    with pytest.raises(OverAge, match="old: generator 0 cut it off, its first tokens are too old"):
        await old
    await requests.resume(0)
    # the third of it, which had no token, enters no more
    assert sorted(engine.log[5:]) == ["-old/0", "-old/1", "-old/2", "runs"]
    engine.finish("fresh/3", "evaluation/e/4")
    await asyncio.gather(fresh, evaluation)


async def test_what_nobody_waits_for_is_taken_out_or_never_enters():
    engine = Engine()
    requests = requests_of(engine)
    inside = asked(requests, "a", n=2)
    await settled()
    inside.cancel()
    await asyncio.wait([inside])
    assert engine.log == ["a/0", "a/1", "-a/0", "-a/1"]
    await requests.pause()
    held = asked(requests, "b", n=2)
    await settled()
    held.cancel()
    await asyncio.wait([held])
    await requests.resume(1)
    assert engine.log[4:] == ["runs"]
