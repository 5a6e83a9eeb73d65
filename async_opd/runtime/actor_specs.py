"""What each actor builds in its own process: the class that plays the role, and its arguments."""

import itertools
from typing import Any, NamedTuple

import msgspec
from tokenizers import Tokenizer

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_sequence
from async_opd.core.role_settings import GeneratorSettings, LearnerSettings, ScorerSettings
from async_opd.core.wire import Needs
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.decoding import decoding
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.roles.verifier.verifier import GroupVerifier


class ActorSpec(NamedTuple):
    """What an actor builds: `target` is "module:name"."""

    target: str
    args: tuple[Any, ...]
    engine: bool = False  # of vLLM's, which holds the model in a process of its own


class ActorSpecs:
    """The specs of one run. No two of its engines have one seed."""

    def __init__(
        self, config: Config, *, eos_ids: list[int], tokenizer: Tokenizer, first_seed: int
    ):
        self._config, self._eos_ids = config, tuple(eos_ids)
        self._tokenizer, self._vocabulary = tokenizer.to_str(), tokenizer.get_vocab_size()
        self._seeds = itertools.count(first_seed)

    def member(self, pool: str, index: int) -> ActorSpec:
        """For a member of that pool."""
        config, name = self._config, f"{pool} {index}"
        if pool == "generator":
            return self._generator(name, config.rollout, config.objective.needs())
        if pool == "teacher-generator":
            return self._teacher_generator(name)
        if pool == "verifier":
            args = config.verify, self._tokenizer, config.timeout.score_s
            return ActorSpec("async_opd.runtime.actor_specs:make_verifier", args)
        return self._scorer(name, pool)

    def learner_rank(self, rank: int) -> ActorSpec:
        """For a rank of the learner."""
        config = self._config
        settings = LearnerSettings(
            model=config.student.model,
            temperature=config.rollout.temperature,
            steps=config.run.steps,
            max_lag_steps=config.run.max_lag_steps,
            stale=config.run.stale,
            truncated=config.rollout.truncated,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.run.seed,
            backend=config.sync.backend,
            bucket_bytes=config.sync.bucket_mib << 20,
            sync_s=config.sync.timeout_s,
            timeout_s=config.timeout.step_s,
            record_every_steps=config.run.samples_every_steps,
            trust_remote_code=config.run.trust_remote_code,
        )
        sections = config.learner, config.objective, config.teacher_sampling
        return ActorSpec("async_opd.roles.learner.engine:LearnerRank", (rank, settings, *sections))

    def _teacher_generator(self, name: str) -> ActorSpec:
        """An engine that holds the teacher and samples as the student's do, once a prompt."""
        config = self._config
        teacher, sampling = config.teacher, config.teacher_sampling
        assert teacher and sampling
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
        return self._generator(
            name,
            rollout,
            Needs(),
            model=teacher.model,
            max_prompt_tokens=teacher.max_prompt_tokens or config.data.max_prompt_tokens,
            as_teacher=True,
        )

    def _generator(
        self, name: str, rollout: RolloutConfig, needs: Needs, **others: Any
    ) -> ActorSpec:
        config = self._config
        settings = GeneratorSettings(
            name=name,
            model=config.student.model,
            eos_ids=self._eos_ids,
            max_prompt_tokens=config.data.max_prompt_tokens,
            vocabulary=self._vocabulary,
            backend=config.sync.backend,
            seed=next(self._seeds),
            trust_remote_code=config.run.trust_remote_code,
        )
        settings = msgspec.structs.replace(settings, **others)
        target = "async_opd.roles.rollout.generator:RolloutGenerator"
        return ActorSpec(target, (settings, rollout, needs), engine=True)

    def _scorer(self, name: str, section: str) -> ActorSpec:
        """A replica of the teacher, or of the reference, in `section`."""
        config, scorer = self._config, self._config.scorers[section]
        reference = section == "reference"
        settings = ScorerSettings(
            name=name,
            temperature=config.rollout.temperature,
            vocabulary=self._vocabulary,
            longest=longest_sequence(section, scorer, config.data, config.rollout)[1],
            eos_ids=self._eos_ids,
            max_new_tokens=config.rollout.max_new_tokens,
            as_student=reference,
            trust_remote_code=config.run.trust_remote_code,
        )
        vllm = scorer.backend == "vllm"
        target = (
            "async_opd.roles.teacher.vllm_teacher:VllmTeacher"
            if vllm
            else "async_opd.roles.teacher.transformers_teacher:TransformersTeacher"
        )
        needs = Needs() if reference else config.objective.needs()
        return ActorSpec(target, (settings, scorer, needs), engine=vllm)


def make_verifier(config: VerifyConfig, tokenizer: str, within_s: float) -> GroupVerifier:
    """Build the verifier in its actor: the pool, and the student's tokenizer (as JSON) to decode
    by, without torch."""
    decode = decoding(Tokenizer.from_str(tokenizer), config.special_tokens)
    return GroupVerifier(VerifierPool(config), decode, within_s)
