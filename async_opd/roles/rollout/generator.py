"""A rollout generator on vLLM's AsyncLLM. A plain class: `runtime/actors.py` makes a Ray actor of
it."""

import asyncio
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from async_opd.core.errors import ActorLost, ConfigError, OverAge, SyncFailed
from async_opd.core.wire import Group, GroupMeta, Needs, Prompt, Rollout, Sampling, Span
from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.rollout.config import RolloutConfig

PROBE_TOKENS = 8  # sampled by the parity probe
EVALUATION = "evaluation/"  # ids of such requests begin with it


class RolloutGenerator:
    """Samples groups continuously; `update` replaces the weights under running requests without
    draining them."""

    def __init__(
        self,
        config: RolloutConfig,
        needs: Needs,
        *,
        name: str,
        model: str,
        eos_ids: list[int],
        max_prompt_tokens: int,
        vocabulary: int,
        backend: str,
        seed: int,
        trust_remote_code: bool = False,
    ):
        """Load the engine with the weights of `model` as version 0. `eos_ids` end a response and
        are part of it. `vocabulary` is the tokenizer's: ids from there on are padding, and never
        among the likeliest candidates. `name` is what errors call it; engines of one run differ in
        `seed`."""
        self._config = config
        self._needs = needs
        self._name = name
        self._eos_ids = eos_ids
        # ids beside each token; `start` has them made
        self._vocabulary, self._candidates = vocabulary, 0
        self._request_ids = itertools.count()
        # a list: paused
        self._held: list[tuple[str, np.ndarray, SamplingParams, asyncio.Future]] | None = None
        self._arrived = asyncio.Condition()
        # tied heads
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(
            logging.ERROR
        )
        cpu, eager = current_platform.is_cpu(), config.enforce_eager
        if cpu and not eager and not shutil.which(os.environ.get("CXX", "g++")):
            raise ConfigError(
                "rollout.enforce_eager = false: compiling on CPU needs a C++ compiler; set it to"
                " true"
            )
        self._block = 128 if cpu else 16  # tokens of one prefix-cache block
        # The probe's prompt is longer than a block and always the same, so stale prefix KV would be
        # hit, and show.
        self._probe_ids = np.random.default_rng(0).integers(
            vocabulary, size=self._block + 16, dtype=np.int32
        )
        if needs.teacher_at_student_ids:
            # vLLM's other runner does not let `candidates` in
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        args = AsyncEngineArgs(
            model=model,
            dtype=config.dtype,
            seed=seed,
            max_model_len=max(
                max_prompt_tokens + config.max_new_tokens, len(self._probe_ids) + PROBE_TOKENS
            ),
            max_num_seqs=config.concurrency,
            block_size=self._block,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            weight_transfer_config=WeightTransferConfig(backend=backend),
            logprobs_mode="processed_logprobs",
            max_logprobs=needs.teacher_at_student_ids,
            worker_extension_cls="async_opd.roles.rollout.vllm_candidates.Candidates",
            scheduling_policy="priority",  # in order of arrival, but for the probe and evaluations
            # end tokens and penalties of the checkpoint's own are not asked for
            generation_config="vllm",
            skip_tokenizer_init=True,
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            **(
                cpu_engine(config.memory_gib, enforce_eager=eager)
                if cpu
                else {"enforce_eager": eager}
            ),
        )
        self._engine = AsyncLLM.from_engine_args(args)

    async def start(self) -> None:
        """Have the engine give the objective's candidates with each token of `generate`; before,
        there are none."""
        if k := self._needs.teacher_at_student_ids:
            await self._engine.collective_rpc(
                "return_candidates", args=(self._needs.student_ids, self._vocabulary)
            )
            self._candidates = k

    def sampling(self, **changes) -> SamplingParams:
        """No seed of its own for a request: on CPU a preempted seeded request kills the engine."""
        settings = dict(
            temperature=self._config.temperature,
            max_tokens=self._config.max_new_tokens,
            n=self._config.samples_per_prompt,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=self._eos_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return SamplingParams(**settings | changes)

    async def generate(self, prompt: Prompt) -> tuple[GroupMeta, Group]:
        """Sample all responses of one prompt; a taught one, which the teacher answers, in the
        teacher's own rendering. Raises ActorLost when the engine died."""
        ids = prompt.shown_to_teacher if prompt.taught else prompt.ids
        return self._group(
            prompt, await self._run(prompt.id, ids, self.sampling(logprobs=self._candidates))
        )

    async def respond(self, prompt: Prompt, sampling: Sampling) -> tuple[GroupMeta, Group]:
        """Responses for an evaluation, in its own way of sampling. They are never cut off for their
        age."""
        settings = self.sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, n=sampling.samples
        )
        return self._group(
            prompt, await self._run(f"{EVALUATION}{prompt.id}", prompt.ids, settings)
        )

    async def probe(self) -> tuple[np.ndarray, Rollout]:
        """The probe's prompt and a few tokens freshly sampled after it, with their log-probs."""
        sampling = self.sampling(n=1, max_tokens=PROBE_TOKENS, ignore_eos=True, stop_token_ids=[])
        (output,) = await self._run("probe", self._probe_ids, sampling)
        return self._probe_ids, self._rollout(f"parity probe of {self._name}", output)

    async def join_group(self, init_info: dict) -> None:
        """Join the learner's weight group; waits until all members have. Raises SyncFailed or
        ActorLost."""
        with self._named("did not join the weight group"):
            await self._engine.init_weight_transfer_engine(
                WeightTransferInitRequest(init_info=init_info)
            )

    async def update(self, version: int, update_info: dict, oldest: int) -> None:
        """Pause, receive and load weights, and label them `version`. Stays paused: `resume` is a
        call of its own.

        Running requests are kept and their KV is rebuilt under the new weights; prefix caches of
        older weights are cleared. Those with a token of a version before `oldest` are cut off. If
        receiving fails (SyncFailed) the old version is still whole, and still the label; another
        try may follow.
        """
        self._held = self._held or []
        with self._named(f"did not take version {version}"):
            # What `pause_generation` does, without its sleep of 20 ms for callers who watch the
            # order of outputs.
            await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))
            await self._engine.finish_weight_update(weight_version=str(version))
            await self._cut(oldest)

    async def resume(self, expected: int) -> None:
        """Run on, once the `expected` requests that were sent during the pause are here. They enter
        the engine in the order of their ids, whatever order they arrived in, so a synchronous run
        repeats itself exactly."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self._held) >= expected)
        held, self._held = self._held, None
        try:
            for id, prompt_ids, sampling, collector in sorted(held, key=lambda request: request[0]):
                if not collector.done():  # cancelled meanwhile
                    collector.set_result(await self._add(id, prompt_ids, sampling))
            await self._engine.resume_generation()
        except EngineDeadError as e:
            raise ActorLost(f"{self._name}: its engine died") from e

    async def check_health(self) -> None:
        """Raise ActorLost when the engine died inside this living actor, which Ray does not notice.
        Answered by the engine itself, between two of its steps: one that hangs does not answer."""
        try:
            await self._engine.get_weight_version()
        except EngineDeadError as e:
            raise ActorLost(f"{self._name}: its engine died") from e

    async def _cut(self, oldest: int) -> None:
        """End the requests that hold a token of a version before `oldest`; `generate` raises
        OverAge for them."""
        old = set()
        for request in self._engine.output_processor.request_states.values():
            versions = request.weight_version_starts
            id = (request.parent_req or request).request_id
            if versions and _version(versions[0][0]) < oldest and not id.startswith(EVALUATION):
                old.add(id)
        if old:
            await self._engine.abort(old, internal=True)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except EngineDeadError as e:
            raise ActorLost(f"{self._name}: its engine died") from e
        except Exception as e:  # vLLM passes on whatever its worker raised as a bare Exception
            raise SyncFailed(f"{self._name} {what}: {e}") from e

    async def _run(
        self, id: str, prompt_ids: np.ndarray, sampling: SamplingParams
    ) -> list[CompletionOutput]:
        collector = None
        try:
            if self._held is None:
                collector = await self._add(id, prompt_ids, sampling)
            else:
                turn = asyncio.get_running_loop().create_future()
                async with self._arrived:
                    self._held.append((id, prompt_ids, sampling, turn))
                    self._arrived.notify_all()
                collector = await turn
            output = await collector.get()
        except EngineDeadError as e:
            raise ActorLost(f"{self._name}: its engine died") from e
        except asyncio.CancelledError:
            if collector is not None:
                await self._engine.abort(collector.request_id, internal=True)
            raise
        if any(sample.finish_reason == "abort" for sample in output.outputs):
            raise OverAge(
                f"{id}: {self._name} cut it off, its first tokens are too old to be trained"
            )
        return sorted(output.outputs, key=lambda sample: sample.index)

    async def _add(
        self, id: str, prompt_ids: np.ndarray, sampling: SamplingParams
    ) -> RequestOutputCollector:
        request_id = f"{id}/{next(self._request_ids)}"
        prompt = {"prompt_token_ids": prompt_ids.tolist()}
        # The learner waits for the probe; an update has put every running request back in the
        # engine's queue. Of an evaluation no more are sent at a time than it may have places, so
        # they need not wait.
        priority = -2 if id == "probe" else -1 if id.startswith(EVALUATION) else 0
        return await self._engine.add_request(request_id, prompt, sampling, priority=priority)

    def _group(self, prompt: Prompt, outputs: list[CompletionOutput]) -> tuple[GroupMeta, Group]:
        group = Group(
            prompt=prompt, rollouts=tuple(self._rollout(prompt.id, output) for output in outputs)
        )
        meta = GroupMeta(
            id=prompt.id,
            prompt_len=len(prompt.ids),
            spans=tuple(r.spans for r in group.rollouts),
            truncated=tuple(r.truncated for r in group.rollouts),
        )
        return meta, group

    def _rollout(self, prompt_id: str, output: CompletionOutput) -> Rollout:
        spans = (
            Span(version=_version(s.version), start=s.start, end=s.end)
            for s in output.weight_versions
        )
        # in each row the sampled token before its candidates
        flat, rows = output.logprobs, len(output.token_ids)
        logp = np.minimum(np.array(flat.logprobs, np.float32), 0).reshape(rows, -1)
        given = {}
        if logp.shape[1] > 1:
            given["candidate_ids"] = np.array(flat.token_ids, np.int32).reshape(logp.shape)[:, 1:]
            given["candidate_logp"] = logp[:, 1:] if self._needs.student_ids == "sampled" else None
        return Rollout(
            id=f"{prompt_id}#{output.index}",
            ids=np.asarray(output.token_ids, np.int32),
            behaviour_logp=logp[:, 0],
            spans=tuple(spans),
            truncated=output.finish_reason == "length",
            **given,
        )


def _version(label: str) -> int:
    """vLLM's label of the weights before any update is "default"."""
    return 0 if label == "default" else int(label)
