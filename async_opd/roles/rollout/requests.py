"""What one vLLM engine is asked for, across updates of its weights."""

import asyncio
import itertools
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from async_opd.core.aio import together
from async_opd.core.errors import ActorLost, CallFailed, OverAge, SyncFailed
from async_opd.core.foreign import foreign
from async_opd.core.wire import Ints

EVALUATION, PROBE = "evaluation/", "probe/"  # ids of such requests begin with them


class Request:
    """One response that is asked for: in the engine, on its way there, or held back."""

    def __init__(self, id: str, index: int, prompt_ids: list[int], sampling: SamplingParams):
        self.id = id  # of the call
        self.index = index  # of the response among those of the call
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.answered = False
        self.arrived = 0.0  # when it entered the engine first, by `time.time`; 0: not yet
        self.wait()

    def wait(self) -> None:
        """Wait to enter the engine, be it once more."""
        self.entered: asyncio.Future[RequestOutputCollector] = (
            asyncio.get_running_loop().create_future()
        )

    @property
    def engine_id(self) -> str | None:
        """What the engine calls it; None of one that is not in there."""
        entered = self.entered
        if self.answered or not entered.done() or entered.cancelled() or entered.exception():
            return None
        return entered.result().request_id


class Requests:
    """The requests of one engine, one for each response; from `pause` to `resume` none enters.

    Where `keeps_kv`, an update leaves running contexts and cached blocks as they are. vLLM shares
    cached blocks among requests of one salt alone, and a request's salt is the number of updates
    there were when it entered. One without a token yet is taken out at an update and enters anew.
    So the KV of a prompt is of the weights that sampled the first token, or of newer ones where
    vLLM preempts a request for want of room: it then finds its own blocks again, or those of a
    request of the same salt, and computes the others under the weights of that moment.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        name: str,
        *,
        keeps_kv: bool,
        adapter: LoRARequest | None = None,
    ):
        """`name` is what errors call the engine; all that it samples is under the `adapter`."""
        self._engine, self._name = engine, name
        self._keeps_kv, self._adapter = keeps_kv, adapter
        self._updates = 0
        self._numbers = itertools.count()
        self._live: set[Request] = set()
        self._held: list[Request] | None = None  # by a pause; None: there is none
        self._called = 0  # calls that came during the pause
        self._entering = 0
        self._changed = asyncio.Condition()  # what is called or entering

    async def run(
        self, id: str, prompt_ids: Ints, sampling: SamplingParams
    ) -> list[CompletionOutput]:
        """Sample `sampling.n` responses, in order. Raises ActorLost when the engine died,
        CallFailed for what it refuses, OverAge when `renew` has cut one off."""
        ids, alone = prompt_ids.tolist(), sampling.clone()
        alone.n = 1
        requests = [Request(id, index, ids, alone) for index in range(sampling.n)]
        self._live.update(requests)
        try:
            if self._held is None:
                for request in requests:
                    await self._enter(request)
            else:
                self._held += requests
                self._called += 1
                async with self._changed:
                    self._changed.notify_all()
            return await together(*(self._output(request) for request in requests))
        except EngineDeadError as e:
            raise ActorLost(f"{self._name}: its engine died") from e
        finally:
            self._live.difference_update(requests)
            await self._abort(requests)

    async def pause(self) -> None:
        """Let none enter from now on; what is on its way there enters first."""
        if self._held is None:
            self._held = []
            self._called = 0
        async with self._changed:
            await self._changed.wait_for(lambda: not self._entering)

    async def renew(self, oldest: int) -> None:
        """Note an update, and end the requests that hold a token of a version before `oldest`, but
        for evaluations. Of the others those without a token enter anew, where KV is kept."""
        assert self._held is not None, "renew without pause"
        self._updates += 1
        out: list[str] = []
        inside = self._engine.output_processor.request_states
        for request in self._live:
            engine_id = request.engine_id
            if engine_id is None or engine_id not in inside:  # held back, or its answer is here
                continue
            if not (starts := inside[engine_id].weight_version_starts):
                if self._keeps_kv:
                    out.append(engine_id)
                    request.wait()
                    self._held.append(request)
            elif version_of(starts[0][0]) < oldest and not request.id.startswith(EVALUATION):
                out.append(engine_id)
        if out:
            await self._engine.abort(out, internal=True)

    async def resume(self, expected: int) -> None:
        """Run on. Where calls are `expected`, wait for so many that were made during the pause, and
        have the engine run behind them. They enter in the order of their ids, whatever order they
        came in. One that the engine refuses is its own caller's error."""
        held = self._held
        assert held is not None, "resume without pause"
        async with self._changed:
            await self._changed.wait_for(lambda: self._called >= expected)
        self._held = None
        if not expected:
            await self._run_on()
        for request in sorted(held, key=lambda each: (each.id, each.index)):
            if request in self._live:  # still asked for
                try:
                    await self._enter(request)
                except CallFailed as e:
                    if not request.entered.cancelled():
                        request.entered.set_exception(e)
        if expected:
            await self._run_on()

    async def _run_on(self) -> None:
        with named(self._name, "did not go on", CallFailed):
            await self._engine.resume_generation()

    async def _enter(self, request: Request) -> None:
        """Put `request` into the engine, or to those that are held back. In there it keeps the
        turn that it had when it entered first."""
        if self._held is not None:
            self._held.append(request)
            return
        request.arrived = request.arrived or time.time()
        # as vLLM would render it, in a thread: the responses of one call would not be in a row
        prompt = tokens_input(
            request.prompt_ids, cache_salt=f"{self._updates}" if self._keeps_kv else None
        )
        # The learner waits for the probe; an update may have put every running request back in the
        # engine's queue. Of an evaluation no more are sent at a time than it may have places, so
        # they need not wait.
        priority = (
            -2 if request.id.startswith(PROBE) else -1 if request.id.startswith(EVALUATION) else 0
        )
        self._entering += 1
        try:
            with named(self._name, f"refuses {request.id}", CallFailed):
                collector = await self._engine.add_request(
                    f"{request.id}/{next(self._numbers)}",
                    prompt,
                    request.sampling,
                    arrival_time=request.arrived,
                    lora_request=self._adapter,
                    priority=priority,
                )
        finally:
            self._entering -= 1
            async with self._changed:
                self._changed.notify_all()
        if request in self._live and not request.entered.cancelled():
            request.entered.set_result(collector)
        else:  # nobody waits for it any more
            await self._engine.abort(collector.request_id, internal=True)

    async def _output(self, request: Request) -> CompletionOutput:
        """Wait for the response. Raises OverAge for one that was cut off."""
        while True:
            entered = request.entered
            result: Any = await (await entered).get()  # a RequestOutput: no model here pools
            if entered is request.entered:
                break
        request.answered = True
        (output,) = result.outputs
        if output.finish_reason == "abort":
            raise OverAge(
                f"{request.id}: {self._name} cut it off, its first tokens are too old to be trained"
            )
        output.index = request.index
        return output

    async def _abort(self, requests: Iterable[Request]) -> None:
        ids = [request.engine_id for request in requests]
        if inside := [id for id in ids if id]:
            await self._engine.abort(inside, internal=True)


@contextmanager
def named(
    name: str, what: str, error: type[SyncFailed | CallFailed] = SyncFailed
) -> Generator[None]:
    """Raise what vLLM raises as `error`, by the `name` of the engine; ActorLost where it died."""
    # vLLM passes on whatever its worker raised as a bare Exception
    with foreign(f"{name} {what}", error):
        try:
            yield
        except EngineDeadError as e:
            raise ActorLost(f"{name}: its engine died") from e


def version_of(label: str) -> int:
    """Read vLLM's label of the weights; before any update that is "default"."""
    return 0 if label == "default" else int(label)
