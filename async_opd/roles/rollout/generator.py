"""A rollout generator on vLLM's AsyncLLM. A plain class, which a
`runtime.actors.RoleActor` builds."""

import asyncio
import itertools
import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from async_opd.core.errors import ActorLost, CallFailed, OverAge, SyncFailed, WireError
from async_opd.core.foreign import foreign
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.vocabulary import drawn, exchanged
from async_opd.core.wire import (
    Group,
    GroupMeta,
    Ints,
    Needs,
    Prompt,
    Rollout,
    Sampling,
    Span,
    WeightGroup,
    WeightLayout,
)
from async_opd.roles.models.vllm_columns import keep_columns
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.rollout.engine_args import engine_args, pin_runner
from async_opd.roles.rollout.stops import stop_tokens
from async_opd.roles.weight_sync.vllm_infos import init_info, update_info

Waiting = tuple[str, Ints, SamplingParams, asyncio.Future[RequestOutputCollector]]
PROBE_TOKENS = 8  # sampled by the parity probe
EVALUATION = "evaluation/"  # ids of such requests begin with it


class RolloutGenerator:
    """Samples groups continuously; `update` replaces the weights under running requests without
    draining them."""

    def __init__(self, settings: GeneratorSettings, config: RolloutConfig, needs: Needs):
        """Load the engine with the weights of `settings.model` as version 0."""
        self._settings, self._config = settings, config
        self._needs = needs
        self._candidates = 0  # ids beside each token; `start` has them made
        self._request_ids = itertools.count()
        # what was sent during a pause; None: there is none
        self._paused: list[Waiting] | None = None
        self._arrived = asyncio.Condition()
        # at each update it warns of tied heads, which get no weights of their own
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(
            logging.ERROR
        )
        # tokens of one prefix-cache block
        block = config.engine.get("block_size") or (128 if current_platform.is_cpu() else 16)
        # The probe's prompt is longer than a block and always the same, so stale prefix KV would be
        # hit, and show.
        self._probe_ids = drawn(settings.vocabulary, block + 16)
        self._texts = [stop for stop in settings.stops if isinstance(stop, str)]
        keep_columns()
        pin_runner(patched=needs.teacher_at_student_ids > 0 and needs.student_ids == "sampled")
        longest = max(
            settings.max_prompt_tokens + config.max_new_tokens,
            len(self._probe_ids) + PROBE_TOKENS,
        )
        self._engine = AsyncLLM.from_engine_args(
            engine_args(settings, config, needs, longest=longest, block=block)
        )
        decode = self._engine.get_tokenizer().decode if self._texts else str
        self._stop_tokens = partial(stop_tokens, stops=settings.stops, decode=decode)

    async def start(self) -> None:
        """Have the engine sample ids of the vocabulary alone, and give the objective's candidates
        with each token of `generate`; before, there are none."""
        await self._engine.collective_rpc("use_only", args=(self._settings.vocabulary,))
        self._candidates = self._needs.teacher_at_student_ids
        if self._candidates and self._needs.student_ids == "sampled":
            await self._engine.collective_rpc("sample_candidates")

    def sampling(self, **changes: Any) -> SamplingParams:
        """The settings of a request. It has no seed of its own: on CPU a preempted seeded request
        kills the engine."""
        settings: dict[str, Any] = dict(
            temperature=self._config.temperature,
            max_tokens=self._config.max_new_tokens,
            n=self._config.samples_per_prompt,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=list(self._settings.eos_ids),
            stop=self._texts,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            detokenize=bool(self._texts),
            ignore_eos=True,  # of the engine's own choice
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return SamplingParams(**settings | changes)

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Group]:
        """Sample all responses of one prompt. Raises ActorLost when the engine died."""
        ids = prompt.shown_to_teacher if self._settings.as_teacher else prompt.ids
        outputs = await self._run(prompt.id, ids, self.sampling(logprobs=self._candidates))
        return self._group(prompt, outputs)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Group]:
        """Responses for an evaluation, in its own way of sampling. They are never cut off for their
        age."""
        settings = self.sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, n=sampling.samples
        )
        return self._group(
            prompt, await self._run(f"{EVALUATION}{prompt.id}", prompt.ids, settings)
        )

    async def probe(self) -> tuple[Ints, Rollout]:
        """The probe's prompt and a few tokens freshly sampled after it, with their log-probs."""
        sampling = self.sampling(n=1, max_tokens=PROBE_TOKENS, stop_token_ids=[], stop=[])
        (output,) = await self._run("probe", self._probe_ids, sampling)
        return self._probe_ids, self._rollout(f"parity probe of {self._settings.name}", output)

    async def join_group(self, group: WeightGroup) -> None:
        """Join the learner's weight group; waits until all members have. Raises SyncFailed or
        ActorLost."""
        with self._named("did not join the weight group"):
            await self._engine.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info(group, self._settings.backend))
            )

    async def update(self, version: int, layout: WeightLayout, oldest: int) -> None:
        """Pause, receive and load weights, and label them `version`. Stays paused: `resume` is a
        call of its own.

        Running requests are kept and their KV is rebuilt under the new weights; prefix caches of
        older weights are cleared. Those with a token of a version before `oldest` are cut off. If
        receiving fails (SyncFailed) the old version is still whole, and still the label; another
        try may follow.
        """
        self._paused = self._paused or []
        with self._named(f"did not take version {version}"):
            # What `pause_generation` does, without its sleep of 20 ms for callers who watch the
            # order of outputs.
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info(layout)))
            await self._engine.finish_weight_update(weight_version=str(version))
            await self._cut(oldest)

    async def resume(self, expected: int) -> None:
        """Run on, once the `expected` requests that were sent during the pause are here. They enter
        the engine in the order of their ids, whatever order they arrived in, so a synchronous run
        repeats itself exactly. One that the engine refuses is its own caller's error."""
        waiting = self._paused
        assert waiting is not None, "resume without update"
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(waiting) >= expected)
        self._paused = None
        for id, prompt_ids, sampling, collector in sorted(waiting, key=lambda each: each[0]):
            if collector.done():  # cancelled meanwhile
                continue
            try:
                collector.set_result(await self._add(id, prompt_ids, sampling))
            except CallFailed as e:
                collector.set_exception(e)
        with self._named("did not go on", CallFailed):
            await self._engine.resume_generation()

    async def check_health(self) -> None:
        """Raise ActorLost when the engine died inside this living actor, which Ray does not notice.
        Answered by the engine itself, between two of its steps: one that hangs does not answer."""
        with self._named("does not answer", CallFailed):
            await self._engine.get_weight_version()

    async def _cut(self, oldest: int) -> None:
        """End the requests that hold a token of a version before `oldest`; `generate` raises
        OverAge for them."""
        ids = (
            (request.parent_req or request).request_id
            for request in self._engine.output_processor.request_states.values()
            if request.weight_version_starts
            and _version(request.weight_version_starts[0][0]) < oldest
        )
        old = {id for id in ids if not id.startswith(EVALUATION)}
        if old:
            await self._engine.abort(old, internal=True)

    @contextmanager
    def _named(
        self, what: str, error: type[SyncFailed | CallFailed] = SyncFailed
    ) -> Generator[None]:
        # vLLM passes on whatever its worker raised as a bare Exception
        with foreign(f"{self._settings.name} {what}", error):
            try:
                yield
            except EngineDeadError as e:
                raise ActorLost(f"{self._settings.name}: its engine died") from e

    async def _run(
        self, id: str, prompt_ids: Ints, sampling: SamplingParams
    ) -> list[CompletionOutput]:
        collector = None
        try:
            if self._paused is None:
                collector = await self._add(id, prompt_ids, sampling)
            else:
                turn = asyncio.get_running_loop().create_future()
                async with self._arrived:
                    self._paused.append((id, prompt_ids, sampling, turn))
                    self._arrived.notify_all()
                collector = await turn
            output: Any = await collector.get()  # a RequestOutput: no model here pools
        except EngineDeadError as e:
            raise ActorLost(f"{self._settings.name}: its engine died") from e
        except asyncio.CancelledError:
            if collector is not None:
                await self._engine.abort(collector.request_id, internal=True)
            raise
        if any(sample.finish_reason == "abort" for sample in output.outputs):
            raise OverAge(
                f"{id}: {self._settings.name} cut it off, its first tokens are too old to be"
                " trained"
            )
        return sorted(output.outputs, key=lambda sample: sample.index)

    async def _add(
        self, id: str, prompt_ids: Ints, sampling: SamplingParams
    ) -> RequestOutputCollector:
        # The learner waits for the probe; an update has put every running request back in the
        # engine's queue. Of an evaluation no more are sent at a time than it may have places, so
        # they need not wait.
        priority = -2 if id == "probe" else -1 if id.startswith(EVALUATION) else 0
        with self._named(f"refuses {id}", CallFailed):
            return await self._engine.add_request(
                f"{id}/{next(self._request_ids)}",
                {"prompt_token_ids": prompt_ids.tolist()},
                sampling,
                priority=priority,
            )

    def _group(self, prompt: Prompt, outputs: list[CompletionOutput]) -> tuple[GroupMeta, Group]:
        group = Group(
            prompt=prompt, rollouts=tuple(self._rollout(prompt.id, output) for output in outputs)
        )
        return (
            GroupMeta(
                id=prompt.id,
                prompt_len=len(prompt.ids),
                spans=tuple(r.spans for r in group.rollouts),
                truncated=tuple(r.truncated for r in group.rollouts),
                failures=tuple(r.failure for r in group.rollouts),
            ),
            group,
        )

    def _rollout(self, prompt_id: str, output: CompletionOutput) -> Rollout:
        # LogprobColumns: in each row the sampled token before its candidates
        columns: Any = output.logprobs
        logp, ids = np.minimum(columns.logp, 0), columns.ids
        written = exchanged(np.asarray(output.token_ids, np.int32), self._settings.ends_as)
        asked = logp.shape[1] > 1
        sampled = asked and self._needs.student_ids == "sampled"
        fields: dict[str, Any] = dict(
            id=f"{prompt_id}#{output.index}",
            ids=written,
            behaviour_logp=logp[:, 0],
            spans=tuple(
                Span(version=_version(s.version), start=s.start, end=s.end)
                for s in output.weight_versions or ()
            ),
            truncated=output.finish_reason == "length",
            candidate_ids=ids[:, 1:] if asked else None,
            candidate_logp=logp[:, 1:] if sampled else None,
            stop_tokens=self._stop_tokens(output.stop_reason, written),
        )
        try:
            return Rollout(**fields)
        except WireError as e:  # a log-prob that is none: the others of its group go on
            return Rollout(**fields, failure=f"{e}")


def _version(label: str) -> int:
    """vLLM's label of the weights before any update is "default"."""
    return 0 if label == "default" else int(label)
