"""A rollout generator on vLLM's AsyncLLM. A plain class, which a
`runtime.actors.RoleActor` builds."""

from functools import partial
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from async_opd.core.errors import CallFailed, SyncFailed, WireError
from async_opd.core.role_settings import GeneratorSettings
from async_opd.core.vocabulary import drawn, exchanged
from async_opd.core.weights import WeightGroup, WeightLayout
from async_opd.core.wire import Group, GroupMeta, Ints, Needs, Prompt, Rollout, Sampling, Span
from async_opd.roles.models.vllm_columns import keep_columns
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.rollout.engine_args import engine_args, pin_runner
from async_opd.roles.rollout.requests import EVALUATION, PROBE, Requests, named, version_of
from async_opd.roles.rollout.stops import stop_tokens
from async_opd.roles.weight_sync import vllm_updates
from async_opd.roles.weight_sync.adapter import ADAPTER

PROBE_TOKENS = 8  # sampled by a probe


class RolloutGenerator:
    """Samples groups continuously; `update` replaces the weights under running requests without
    draining them."""

    def __init__(self, settings: GeneratorSettings, config: RolloutConfig, needs: Needs):
        """Load the engine with the weights of `settings.model` as version 0."""
        self._settings, self._config = settings, config
        self._needs = needs
        self._candidates = 0  # ids beside each token; `start` has them made
        self._whole = True  # its weights are all of one version
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
        self._requests = Requests(
            self._engine,
            settings.name,
            keeps_kv=settings.keeps_kv,
            adapter=ADAPTER if settings.lora else None,
        )
        decode = self._engine.get_tokenizer().decode if self._texts else str
        self._stop_tokens = partial(stop_tokens, stops=settings.stops, decode=decode)
        self._named = partial(named, settings.name)

    async def start(self) -> None:
        """Have the engine sample ids of the vocabulary alone, under an adapter where updates bring
        one, and give the objective's candidates with each token of `generate`; before, there are
        none."""
        await self._engine.collective_rpc("use_only", args=(self._settings.vocabulary,))
        if self._settings.lora:
            await self._engine.collective_rpc("begin_adapter")
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
        outputs = await self._requests.run(prompt.id, ids, self.sampling(logprobs=self._candidates))
        return self._group(prompt, outputs)

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Group]:
        """Responses for an evaluation, in its own way of sampling. They are never cut off for their
        age."""
        settings = self.sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, n=sampling.samples
        )
        return self._group(
            prompt, await self._requests.run(f"{EVALUATION}{prompt.id}", prompt.ids, settings)
        )

    async def probe(self, prompt: Ints | None = None, tokens: int = 0) -> tuple[Ints, Rollout]:
        """A few tokens freshly sampled after `prompt`, or one of its own, which comes first."""
        if prompt is None:
            prompt, tokens = self._probe_ids, PROBE_TOKENS
        sampling = self.sampling(n=1, max_tokens=tokens, stop_token_ids=[], stop=[])
        (output,) = await self._requests.run(f"{PROBE}{prompt.sum()}", prompt, sampling)
        return prompt, self._rollout(f"parity probe of {self._settings.name}", output)

    async def join_group(self, group: WeightGroup) -> None:
        """Join the learner's weight group; waits until all members have. Raises SyncFailed or
        ActorLost."""
        with self._named("did not join the weight group"):
            await vllm_updates.join(self._engine, group)

    async def update(self, version: int, layout: WeightLayout, oldest: int) -> None:
        """Pause, receive and load weights, and label them `version`. Stays paused: `resume` is a
        call of its own.

        Running requests go on, under the new weights: over KV that is computed anew by these, or,
        with `keeps_kv`, over what it was; none that enters later reads KV of older weights. Those
        with a token of a version before `oldest` are cut off. If receiving fails (SyncFailed)
        another try may follow, after `join_group`. By gloo the old version is still whole then, and
        still the label; by nccl some weights may be new, or neither, and `resume` refuses until a
        whole update has come. An adapter is taken whole by either, or not.
        """
        self._whole = self._settings.backend == "gloo" or layout.adapter
        with self._named(f"did not take version {version}"):
            await self._requests.pause()
            # What `pause_generation` does, without its sleep of 20 ms for callers who watch the
            # order of outputs.
            await self._engine.engine_core.pause_scheduler_async(
                mode="keep", clear_cache=not self._settings.keeps_kv
            )
            await vllm_updates.take(self._engine, version, layout)
            self._whole = True
            await self._requests.renew(oldest)

    async def resume(self, expected: int) -> None:
        """Run on, once the `expected` requests that were sent during the pause are here; they are
        in the engine before it does. With none expected it runs on at once. Either way they enter
        in the order of their ids, so a synchronous run repeats itself exactly."""
        if not self._whole:
            raise SyncFailed(f"{self._settings.name}: its last update broke off half-way")
        await self._requests.resume(expected)

    async def check_health(self) -> None:
        """Raise ActorLost when the engine died inside this living actor, which Ray does not notice.
        Answered by the engine itself, between two of its steps: one that hangs does not answer."""
        with self._named("does not answer", CallFailed):
            await self._engine.get_weight_version()

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
                Span(version=version_of(s.version), start=s.start, end=s.end)
                for s in output.weight_versions or ()
            ),
            truncated=output.finish_reason == "length",
            candidate_ids=ids[:, 1:] if asked else None,
            candidate_logp=logp[:, 1:] if sampled else None,
            stop_tokens=self._stop_tokens(output.stop_reason, written),
            kept_kv=self._settings.keeps_kv,
        )
        try:
            return Rollout(**fields)
        except WireError as e:  # a log-prob that is none: the others of its group go on
            return Rollout(**fields, failure=f"{e}")
