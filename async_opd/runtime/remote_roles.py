"""The ports over actors: which call, which timeout, which results stay references."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol

import numpy as np

from async_opd.config.schema import Config
from async_opd.core.aio import retrieved
from async_opd.core.errors import ActorLost, AsyncOpdError
from async_opd.core.ports import Ready, Ref
from async_opd.core.wire import GroupMeta, Prompt, Rollout, Said, Sampling, StepResult, Verdict
from async_opd.maths.packing import plan

LAST_WORDS_S = 5.0  # for the other ranks, once one has failed


class Actor(Protocol):
    """A role in a process of its own."""

    async def call(self, timeout_s: float, method: str, *args: Any) -> Any: ...
    async def spread(
        self, timeout_s: float, count: int, how: str, method: str, *args: Any
    ) -> tuple[Any, list[Ref]]: ...
    async def check_health(self, timeout_s: float) -> None: ...
    def kill(self) -> None: ...


class Together:
    """Requests of the same few milliseconds travel in one remote call, which costs the driver the
    same for one group as for many: prompts that were handed out together tend to finish
    together."""

    LINGER_S = 0.005

    def __init__(self, send: Callable[[list[Ref]], Awaitable[list[Any]]]):
        self._send = send
        self._batch: list[Ref] = []

    async def __call__(self, item: Ref) -> Any:
        """The result of `item`, raised where it is an error; an error of the call is every
        item's."""
        if not self._batch:
            self._sent = retrieved(asyncio.create_task(self._flush()))
        self._batch.append(item)
        at, sent = len(self._batch) - 1, self._sent
        result = (await asyncio.shield(sent))[at]
        if isinstance(result, Exception):
            raise result
        return result

    async def _flush(self) -> list[Any]:
        await asyncio.sleep(self.LINGER_S)
        batch, self._batch = self._batch, []
        return await self._send(batch)


class _Member:
    """What every port over one actor has."""

    def __init__(self, actor: Actor, config: Config):
        self._actor, self._stall_s = actor, config.timeout.stall_s

    async def check_health(self) -> None:
        await self._actor.check_health(self._stall_s)

    def kill(self) -> None:
        self._actor.kill()


class GeneratorProxy(_Member):
    """`ports.Generator` over an actor."""

    def __init__(self, actor: Actor, config: Config):
        super().__init__(actor, config)
        self._sync_s, self._generate_s = config.sync.timeout_s, config.timeout.generate_s
        self._sent = 0  # requests since the last update: what `resume` waits for

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Ref]:
        return await self._group("generate", prompt)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Ref]:
        return await self._group("respond", prompt, sampling)

    async def probe(self) -> tuple[np.ndarray, Rollout]:
        self._sent += 1
        return await self._actor.call(self._generate_s, "probe")

    async def join_group(self, init_info: dict) -> None:
        await self._actor.call(2 * self._sync_s, "join_group", init_info)

    async def update(self, version: int, update_info: dict, oldest: int) -> None:
        try:
            await self._actor.call(2 * self._sync_s, "update", version, update_info, oldest)
        finally:
            self._sent = 0

    async def resume(self) -> None:
        await self._actor.call(self._sync_s, "resume", self._sent)

    async def _group(self, method: str, *args: Any) -> tuple[GroupMeta, Ref]:
        self._sent += 1
        meta, (group,) = await self._actor.spread(self._generate_s, 1, "call", method, *args)
        return meta, group


class TeacherProxy(_Member):
    """`ports.Teacher` over an actor: a teacher's, or the reference's."""

    def __init__(self, actor: Actor, config: Config, eos_ids: list[int]):
        super().__init__(actor, config)
        self._config, self._score_s = config, config.timeout.score_s
        self._eos_ids = eos_ids
        self.score = Together(self._score_all)

    async def greedy(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        settings = self._config.rollout.max_new_tokens, self._eos_ids
        return await self._actor.call(self._config.timeout.generate_s, "greedy", prompts, *settings)

    async def load(self, folder: str) -> None:
        await self._actor.call(self._config.timeout.step_s, "load", folder)

    async def save(self, file: str) -> None:
        await self._actor.call(self._config.timeout.step_s, "save", file)

    async def restore(self, file: str) -> None:
        await self._actor.call(self._config.timeout.step_s, "restore", file)

    async def _score_all(self, groups: list[Ref]) -> list[Ref | AsyncOpdError]:
        errors, scores = await self._actor.spread(
            self._score_s, len(groups), "each", "score", *groups
        )
        return [error or score for error, score in zip(errors, scores, strict=True)]


class VerifierProxy(_Member):
    """`ports.Verifier` over an actor that owns the pool's processes."""

    def __init__(self, actor: Actor, config: Config):
        super().__init__(actor, config)
        self._score_s = config.timeout.score_s
        self._together = Together(self._check_all)

    async def check(self, group: Ref) -> tuple[Verdict, ...]:
        verdicts = await self._together(group)
        return (
            await self._actor.call(self._score_s, "late", verdicts)
            if isinstance(verdicts, str)
            else verdicts
        )

    async def _check_all(self, groups: list[Ref]) -> list[tuple[Verdict, ...] | str]:
        return await self._actor.call(self._score_s, "check_all", *groups)

    async def check_response(self, id: str, ids: np.ndarray, answer: str) -> Verdict:
        return await self._actor.call(self._score_s, "check_response", id, ids, answer)

    async def said(self, group: Ref, verdicts: tuple[Verdict, ...]) -> tuple[Said, ...]:
        return await self._actor.call(self._score_s, "said", group, verdicts)


class LearnerProxy:
    """`ports.Learner` over one actor a rank."""

    def __init__(self, ranks: list[Actor], address: str, config: Config):
        self.ranks = ranks
        self._address = address
        self._config = config
        self._step_s, self._sync_s = config.timeout.step_s, config.sync.timeout_s
        self._width: int | None = None  # hidden size of the student, once it is known

    async def step(self, groups: list[Ready]) -> StepResult:
        self._width = self._width or await self.ranks[0].call(self._step_s, "width")
        shares = self._plan(groups)
        steps = (
            self._rank_step(rank, share, groups)
            for rank, share in zip(self.ranks, shares, strict=True)
        )
        return (await _of_all(steps))[0]

    def _plan(self, groups: list[Ready]) -> list[list[list[tuple[int, int]]]]:
        """[rank][micro-batch] of (group, sample), as many micro-batches on every rank. What the
        teacher answered comes last, in micro-batches of its own: its loss is another."""
        shares = [[] for _ in self.ranks]
        for taught in (False, True):
            index = [
                (g, s) for g, r in enumerate(groups) if r.prompt.taught == taught for s in r.samples
            ]
            if not index:
                continue
            lengths = [groups[g].meta.prompt_len + groups[g].meta.lengths[s] for g, s in index]
            tokens = self._config.learner.micro_batch_tokens
            planned = plan(lengths, ranks=len(self.ranks), tokens=tokens, width=self._width)
            for share, micros in zip(shares, planned, strict=True):
                share += [[index[i] for i in micro] for micro in micros]
        return shares

    async def _rank_step(
        self, rank: Actor, share: list[list[tuple[int, int]]], groups: list[Ready]
    ) -> StepResult:
        used = sorted({g for micro in share for g, _ in micro})
        here = {g: at for at, g in enumerate(used)}
        micros = [[(here[g], s) for g, s in micro] for micro in share]
        verdicts = [groups[g].verdicts for g in used]
        data = [groups[g].group for g in used] + [groups[g].scores for g in used]
        references = [groups[g].reference for g in used]
        data += references if any(reference is not None for reference in references) else []
        return await rank.call(self._step_s, "step", micros, verdicts, *data)

    async def open_group(self, generators: int) -> list[dict]:
        size = self._config.rollout.tensor_parallel_size
        offsets = [1 + at * size for at in range(generators)]
        args = (
            self._config.sync.backend,
            self._address,
            offsets,
            1 + generators * size,
            self._sync_s,
        )
        return await self.ranks[0].call(self._sync_s, "open_group", *args)

    async def join_group(self, generators: int) -> None:
        world = 1 + generators * self._config.rollout.tensor_parallel_size
        await self.ranks[0].call(2 * self._sync_s, "join_group", world)

    async def update_info(self) -> dict:
        return await self.ranks[0].call(self._sync_s, "update_info")

    async def send_weights(self) -> None:
        await self._collective(2 * self._sync_s, "send_weights")

    async def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        return await self._collective(self._step_s, "logprobs", prompt_ids, response_ids)

    async def save(self, folder: str) -> None:
        await self._collective(self._step_s, "save", folder)

    async def save_state(self, folder: str) -> None:
        await self._collective(self._step_s, "save_state", folder)

    async def load_state(self, folder: str) -> None:
        await self._collective(self._step_s, "load_state", folder)

    async def _collective(self, timeout_s: float, method: str, *args: Any) -> Any:
        """Call every rank, as ZeRO-3 needs; rank 0's result."""
        return (await _of_all(rank.call(timeout_s, method, *args) for rank in self.ranks))[0]


async def _of_all(calls: Iterable[Coroutine]) -> list[Any]:
    """Results of what all ranks do with one another. Where one is lost, that is the error, whatever
    the others say."""
    tasks = [retrieved(asyncio.ensure_future(call)) for call in calls]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    if others:  # a dead rank is noticed later than what its death did to them
        done |= (await asyncio.wait(others, timeout=LAST_WORDS_S))[0]
    errors = [error for task in done if (error := task.exception())]
    for task in tasks:
        task.cancel()
    if errors:
        raise next((error for error in errors if isinstance(error, ActorLost)), errors[0])
    return [task.result() for task in tasks]
