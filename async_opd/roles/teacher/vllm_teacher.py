"""A teacher on vLLM, for models that one device cannot hold. A plain class, which a
`runtime.actors.RoleActor` builds."""

import asyncio
import itertools
from typing import Any

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from async_opd.core.errors import ActorLost, AsyncOpdError, CallFailed
from async_opd.core.foreign import foreign
from async_opd.core.precision import dtype_on
from async_opd.core.role_settings import ScorerSettings
from async_opd.core.vocabulary import exchanged, listed
from async_opd.core.wire import Floats, Group, Ints, Needs, Rollout, Scores
from async_opd.roles.models.vllm_columns import keep_columns
from async_opd.roles.models.vllm_cpu import cpu_engine
from async_opd.roles.rollout.engine_args import pin_runner, with_table
from async_opd.roles.teacher.candidates import (
    Answer,
    Columns,
    Outcome,
    answer,
    candidates_of,
    matched,
    refuse_unknown_ids,
    scores_of,
)
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.roles.teacher.probe import probe_answer, probe_group


class VllmTeacher:
    """Scores responses as the ends of prompts, whose log-probs vLLM gives at temperature 1 and
    without entropy.

    It gives them of the candidates alone: the tail is what these leave of 1, and no less than
    TAIL_FLOOR."""

    def __init__(
        self, settings: ScorerSettings, config: TeacherConfig | ReferenceConfig, needs: Needs
    ):
        """Load the engine for sequences of at most `settings.longest` tokens."""
        assert config.model  # a reference without one of its own is sent with the student's
        self._settings = settings
        self._needs = needs
        self._request_ids = itertools.count()
        # ids that this model has and the student has not
        self._foreign = settings.whole != settings.vocabulary
        keep_columns()
        pin_runner(patched=needs.teacher_topk > 0 and self._foreign)
        ours: dict[str, Any] = dict(
            model=config.model,
            dtype=dtype_on(not current_platform.is_cpu(), config.dtype),
            max_model_len=settings.longest + 1,  # vLLM samples a token behind every prompt
            max_num_batched_tokens=config.batch_tokens,
            max_num_seqs=min(config.batch_tokens, 256),
            max_logprobs=-1,
            enable_prefix_caching=False,  # prompt log-probs could not use it
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            # Penalties and end tokens of the checkpoint's own would bend `greedy`.
            generation_config="vllm",
            worker_extension_cls="async_opd.roles.rollout.vllm_candidates.Candidates",
            skip_tokenizer_init=not settings.stops,
            trust_remote_code=settings.trust_remote_code,
            disable_log_stats=True,
        )
        if current_platform.is_cpu():
            # It would be compiled for lengths that never come again.
            ours |= cpu_engine(config.memory_gib, enforce_eager=True)
        self._engine = AsyncLLM.from_engine_args(with_table(settings.section, ours, config.engine))
        self._logits = self._engine.model_config.get_vocab_size()

    async def start(self) -> None:
        """Have the engine use the ids of this model's own tokenizer alone, and pick candidates
        among those that the student knows."""
        if self._settings.whole:
            await self._engine.collective_rpc("use_only", args=(self._settings.whole,))
        if self._needs.teacher_topk and self._foreign:
            await self._engine.collective_rpc("pick_among", args=(self._settings.vocabulary,))

    async def score(self, group: Group) -> Answer:
        """Score each rollout of `group`, each a request of its own, and say why it has no scores.
        Raises ActorLost when the engine died."""
        return answer(await self._outcomes(group))

    async def probe(self) -> Floats:
        """What it says of a few tokens that are always the same, [T, F], to be compared with what
        its replicas say. Raises ActorLost."""
        group = probe_group(self._settings, self._logits, self._needs)
        return probe_answer(group, await self._outcomes(group))

    async def _outcomes(self, group: Group) -> list[Outcome]:
        prompt = group.prompt.ids if self._settings.as_student else group.prompt.shown_to_teacher
        return await asyncio.gather(*(self._outcome(prompt, r) for r in group.rollouts))

    async def _outcome(self, prompt: Ints, rollout: Rollout) -> Outcome:
        """The scores of `rollout`, or what went wrong with it alone: an id that the engine has no
        row for would be its death."""
        try:
            refuse_unknown_ids(prompt, rollout, self._logits, self._needs)
            with foreign(f"{rollout.id}: scored by vLLM", CallFailed):
                return matched(rollout, await self._score(prompt, rollout))
        except ActorLost:
            raise
        except AsyncOpdError as e:
            return e

    async def _score(self, prompt: Ints, rollout: Rollout) -> Scores:
        columns = await self._read(prompt, rollout)
        return scores_of(rollout, columns, self._settings, self._needs)

    async def _read(self, prompt: Ints, rollout: Rollout) -> Columns:
        """Read what is told of a response; of it what is told at the rollout's candidates vLLM
        reads on GPUs only."""
        k = self._needs.teacher_topk
        scoring: dict[str, Any] = {"prompt_logprobs": k, "flat_logprobs": True, "max_tokens": 1}
        if self._needs.teacher_at_student_ids:
            scoring |= {
                "prompt_logprob_token_ids": exchanged(
                    candidates_of(rollout), self._settings.ends_as
                ),
                "prompt_logprob_start": len(prompt) - 1,
            }
        response = exchanged(rollout.ids, self._settings.ends_as)
        output = await self._run(np.concatenate([prompt, response]), **scoring)
        columns: Any = output.prompt_logprobs  # LogprobColumns
        rows = slice(len(columns) - len(rollout.ids), None)
        # copies, which the rows of the prompt do not outlive
        logp = np.minimum(columns.logp[rows], 0)
        return Columns(
            sampled_logp=logp[:, 0],
            topk_ids=columns.ids[rows, 1:].copy(),
            topk_logp=logp[:, 1:],
            candidate_logp=output.prompt_token_id_logprobs,
        )

    async def greedy(self, *prompts: Ints) -> list[Ints]:
        """Respond with the likeliest tokens, int32 each, to measure the teacher's accuracy. Raises
        ActorLost."""
        known = listed(self._settings.vocabulary).tolist() if self._foreign else None
        outputs = await asyncio.gather(
            *(
                self._run(
                    ids,
                    temperature=0.0,
                    max_tokens=self._settings.max_new_tokens,
                    stop_token_ids=list(self._settings.eos_ids),
                    stop=list(self._settings.stops),
                    include_stop_str_in_output=True,
                    skip_special_tokens=False,
                    ignore_eos=True,  # of the engine's own choice
                    allowed_token_ids=known,
                )
                for ids in prompts
            )
        )
        return [
            exchanged(np.array(output.outputs[0].token_ids, np.int32), self._settings.ends_as)
            for output in outputs
        ]

    async def check_health(self) -> None:
        """Raise ActorLost when the engine died. Answered by the engine itself, between two of its
        steps."""
        try:
            await self._engine.get_weight_version()
        except EngineDeadError as e:
            raise ActorLost(f"{self._settings.name}: its engine died") from e

    async def _run(self, ids: Ints, **sampling: Any) -> RequestOutput:
        try:
            (output,) = [
                output
                async for output in self._engine.generate(
                    {"prompt_token_ids": ids.tolist()},
                    SamplingParams(
                        detokenize=bool(sampling.get("stop")),
                        output_kind=RequestOutputKind.FINAL_ONLY,
                        **sampling,
                    ),
                    str(next(self._request_ids)),
                )
            ]
        except EngineDeadError as e:
            raise ActorLost(f"{self._settings.name}: its engine died") from e
        return output
