"""Who plays each role, and with what: the class that an actor builds in its own process, and its
arguments."""

import itertools
from typing import Any, NamedTuple

import msgspec
import numpy as np
from tokenizers import Tokenizer

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_sequence
from async_opd.core.wire import Needs
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.roles.verifier.verifier import GroupVerifier


class Part(NamedTuple):
    """What an actor builds: `target` is "module:name"."""

    target: str
    args: tuple
    settings: dict[str, Any]
    engine: bool = False  # of vLLM's, which holds the model in a process of its own


class Casting:
    """The parts of one run. No two engines that it casts have one seed."""

    def __init__(
        self, config: Config, *, eos_ids: list[int], tokenizer: Tokenizer, first_seed: int
    ):
        self._config, self._eos_ids = config, eos_ids
        self._tokenizer, self._vocabulary = tokenizer.to_str(), tokenizer.get_vocab_size()
        self._seeds = itertools.count(first_seed)
        self._remote_code = {"trust_remote_code": config.run.trust_remote_code}

    def member(self, pool: str, index: int) -> Part:
        """For a seat of that pool."""
        config, name = self._config, f"{pool} {index}"
        if pool == "generator":
            return self._generator(
                name, config.rollout, config.objective.needs(), config.student.model
            )
        if pool == "teacher-generator":
            return self._teacher_generator(name)
        if pool == "verifier":
            args = config.verify, self._tokenizer, config.timeout.score_s
            return Part("async_opd.runtime.actor_specs:make_verifier", args, {})
        return self._scorer(name, pool)

    def learner_rank(self, rank: int) -> Part:
        """For a rank of the learner."""
        config = self._config
        run = self._config.run
        sampling = self._config.teacher_sampling
        settings = dict(
            model=config.student.model,
            temperature=config.rollout.temperature,
            steps=run.steps,
            max_lag_steps=run.max_lag_steps,
            stale=run.stale,
            truncated=config.rollout.truncated,
            cap=config.rollout.max_new_tokens,
            seed=run.seed,
            rank=rank,
            timeout_s=config.timeout.step_s,
            bucket_bytes=config.sync.bucket_mib << 20,
            taught_weight=sampling and sampling.weight,
            record_every_steps=run.samples_every_steps,
            **self._remote_code,
        )
        return Part(
            "async_opd.roles.learner.engine:LearnerRank",
            (config.learner, config.objective),
            settings,
        )

    def _teacher_generator(self, name: str) -> Part:
        """An engine that holds the teacher and samples as the student's do, once a prompt."""
        config = self._config
        teacher = self._config.teacher
        sampling = self._config.teacher_sampling
        rollout = msgspec.structs.replace(
            config.rollout,
            samples_per_prompt=1,
            max_new_tokens=sampling.max_new_tokens or config.rollout.max_new_tokens,
            concurrency=sampling.concurrency,
            dtype=teacher.dtype,
            tensor_parallel_size=teacher.tensor_parallel_size,
            memory_gib=teacher.memory_gib,
            gpu_memory_utilization=teacher.gpu_memory_utilization,
        )
        return self._generator(name, rollout, Needs(), teacher.model, teacher.max_prompt_tokens)

    def _generator(
        self,
        name: str,
        rollout: RolloutConfig,
        needs: Needs,
        model: str,
        longest_prompt: int | None = None,
    ) -> Part:
        settings = dict(
            name=name,
            model=model,
            eos_ids=self._eos_ids,
            max_prompt_tokens=longest_prompt or self._config.data.max_prompt_tokens,
            vocabulary=self._vocabulary,
            backend=self._config.sync.backend,
            seed=next(self._seeds),
            **self._remote_code,
        )
        return Part(
            "async_opd.roles.rollout.generator:RolloutGenerator",
            (rollout, needs),
            settings,
            engine=True,
        )

    def _scorer(self, name: str, at: str) -> Part:
        """A replica of the teacher, or of the reference, in section `at`."""
        config = self._config
        scorer = self._config.scorers[at]
        reference = at == "reference"
        vllm = scorer.backend == "vllm"
        _, longest = longest_sequence(at, scorer, config.data, config.rollout)
        own = (
            {"role": name, "longest": longest}
            if vllm
            else {"temperature": config.rollout.temperature}
        )
        settings = dict(
            vocabulary=self._vocabulary, as_student=reference, **own, **self._remote_code
        )
        return Part(
            "async_opd.roles.teacher.vllm_teacher:VllmTeacher"
            if vllm
            else "async_opd.roles.teacher.transformers_teacher:TransformersTeacher",
            (scorer, Needs() if reference else config.objective.needs()),
            settings,
            engine=vllm,
        )


def make_verifier(config: VerifyConfig, tokenizer: str, within_s: float) -> GroupVerifier:
    """Runs in the verifier's actor: the pool, and the student's tokenizer (as JSON) to decode by,
    without torch."""
    decoder = Tokenizer.from_str(tokenizer)

    def decode(ids: np.ndarray) -> str:
        return decoder.decode(ids.tolist(), skip_special_tokens=True)

    return GroupVerifier(VerifierPool(config), decode, within_s)
