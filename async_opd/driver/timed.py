"""Ports that account for an actor's time as the driver sees it, from the start of a call to its
answer.

- busy: generator: it has a request and is not syncing; teacher, verifier: it has a group; learner:
  in `step`
- starved: lacks input. Generator: it has no request and no prompt is left to hand out; one that
  holds the teacher: it has no request; teacher, verifier: no group has come; learner: the queue
  holds less than a step
- blocked: held back from behind. Generator: it has no request, prompts are left, and every slot is
  held by a group that is with a teacher, the verifier, the queue, the learner or another generator;
  learner: the driver, a checkpoint or self-teachers have it wait. Teacher, verifier: never, nothing
  behind them makes them wait
- syncing: generator: from the start of `update` to the end of `resume`; teacher: in `load`;
  learner: in `Publisher.publish`
- down: from when it is given up until another takes its place

The learner's states are set by the main loop. What an actor does inside a call (a rank that waits
for another, a request that waits for a place in the engine) the driver cannot see.
"""

from collections.abc import Awaitable
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

from async_opd.core.ports import Ref
from async_opd.core.wire import GroupMeta, Prompt, Rollout, Said, Sampling, Verdict
from async_opd.telemetry.spans import CUT_OFF, ActorTime, Of

T = TypeVar("T")
# whose `Ref` this task passes on: nobody looks into one
GROUP: ContextVar[str] = ContextVar("group", default="")


class _Timed:
    """Enters the state that follows from the calls that are out; with none, the actor is `idle`."""

    def __init__(self, port: Any, time: ActorTime, idle: str = "starved"):
        self._port = port
        self._time = time
        self._idle = idle
        # `out`: calls without an answer yet
        self.out = 0
        self._syncing = False
        self._killed = False
        self._tell()

    def _tell(self) -> float:
        """Returns when that is."""
        if self._killed:  # the time may be another's by now
            return self._time.now()
        at_work = "busy" if self.out else self._idle
        return self._time.enter("syncing" if self._syncing else at_work)

    async def _work(self, call: Awaitable[T], name: str = "", of: Of = "") -> T:
        self.out += 1
        start, end = self._tell(), CUT_OFF
        try:
            answer = await call
            end = ""
            return answer
        finally:
            self.out -= 1
            ended = self._tell()
            if name:
                self._time.called(name + end, of, start, ended)

    async def check_health(self) -> None:
        await self._port.check_health()

    def kill(self) -> None:
        self._killed = True
        self._time.enter("down")
        self._port.kill()


class TimedGenerator(_Timed):
    """`ports.Generator` that accounts for its time: one that waits for a slot is "blocked" until no
    prompt is left."""

    def no_prompt_is_left(self) -> None:
        """From now on it idles because there is nothing to hand out."""
        self._idle = "starved"
        self._tell()

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Ref]:
        return await self._work(self._port.generate(prompt), "generate", prompt.id)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Ref]:
        return await self._work(self._port.respond(prompt, sampling), "respond", GROUP.get())

    async def probe(self) -> tuple[np.ndarray, Rollout]:
        return await self._work(self._port.probe(), "probe")

    async def join_group(self, init_info: dict) -> None:
        await self._port.join_group(init_info)

    async def update(self, version: int, update_info: dict, oldest: int) -> None:
        self._syncing = True
        await self._work(self._port.update(version, update_info, oldest), "update", version)

    async def resume(self) -> None:
        await self._work(self._port.resume())
        self._syncing = False
        self._tell()


class TimedTeacher(_Timed):
    """`ports.Teacher` that accounts for its time; the reference is one too."""

    async def score(self, group: Ref) -> Ref:
        return await self._work(self._port.score(group), "score", GROUP.get())

    async def greedy(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        return await self._work(self._port.greedy(prompts), "greedy")

    async def load(self, folder: str) -> None:
        self._syncing = True
        try:
            await self._work(self._port.load(folder), "load")
        finally:
            self._syncing = False
            self._tell()

    async def save(self, file: str) -> None:
        await self._work(self._port.save(file), "save")

    async def restore(self, file: str) -> None:
        await self._work(self._port.restore(file), "restore")


class TimedVerifier(_Timed):
    """`ports.Verifier` that accounts for its time."""

    async def check(self, group: Ref) -> tuple[Verdict, ...]:
        return await self._work(self._port.check(group), "check", GROUP.get())

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        return await self._work(self._port.check_response(id, ids, answer), "check", id)

    async def said(self, group: Ref, verdicts: tuple[Verdict, ...]) -> tuple[Said, ...]:
        return await self._work(self._port.said(group, verdicts), "said", GROUP.get())
