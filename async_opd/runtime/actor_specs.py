"""What each actor builds in its own process: the class that plays the role, and its arguments."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from tokenizers import Tokenizer

from async_opd.config.schema import Config
from async_opd.config.server_rules import key_of
from async_opd.config.teacher_rules import longest_sequence, teacher_section
from async_opd.core.role_settings import GeneratorSettings, LearnerSettings, ScorerSettings
from async_opd.core.secret import Secret
from async_opd.core.vocabulary import Ids, Tokens, exchanged, listed, runs
from async_opd.core.wire import Needs
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.decoding import decoding
from async_opd.roles.verifier.pool import VerifierPool
from async_opd.roles.verifier.verifier import GroupVerifier
from async_opd.runtime.placement import RANK

if TYPE_CHECKING:
    from async_opd.roles.teacher.server.teacher import ServerTeacher


class ActorSpec(NamedTuple):
    """What an actor builds: `target` is "module:name"."""

    target: str
    args: tuple[Any, ...]
    engine: bool = False  # of vLLM's, which holds the model in a process of its own


class ActorSpecs:
    """The specs of one run. No two of its engines have one seed."""

    def __init__(self, config: Config, *, tokens: Tokens, tokenizer: Tokenizer, first_seed: int):
        self._config, self._tokens = config, tokens
        self._tokenizer = tokenizer.to_str()
        self._seeds = itertools.count(first_seed)

    def member(self, pool: str, which: int | str) -> ActorSpec:
        """For a member of that pool, by its number, or by the address of the server it asks."""
        config, name = self._config, f"{pool} {which}"
        if pool == "generator":
            return self._generator(name, config.rollout, config.objective.needs())
        if pool == "teacher-generator":
            return self._teacher_generator(name)
        if pool == "verifier":
            args = config.verify, self._tokenizer, config.timeout.score_s, *self._texts
            return ActorSpec("async_opd.runtime.actor_specs:make_verifier", args)
        return self._scorer(name, pool, which)

    def learner_rank(self, rank: int) -> ActorSpec:
        """For a rank of the learner."""
        config, name = self._config, f"{RANK} {rank}"
        inside = {each: self._scorer_settings(name, each) for each in config.in_learner}
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
            vocabulary=self._tokens.student,
            train_stop=config.rollout.train_stop,
            record_every_steps=config.run.samples_every_steps,
            trust_remote_code=config.run.trust_remote_code,
            lora=config.student.lora,
            teachers={
                name: inside[section]
                for name in config.named_teachers
                if (section := teacher_section(name)) in inside
            },
            reference=inside.get("reference"),
            sends_adapter=config.sync.lora == "adapter",
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
            engine={k: v for k, v in teacher.engine.items() if k != "max_num_seqs"},
        )
        return self._generator(
            name,
            rollout,
            Needs(),
            model=teacher.model,
            max_prompt_tokens=teacher.max_prompt_tokens or config.data.max_prompt_tokens,
            as_teacher=True,
            eos_ids=self._in_ids_of("teacher", self._tokens.eos_ids),
            vocabulary=self._vocabulary("teacher"),
            ends_as=self._tokens.ends_as.get("teacher", ()),
            lora=None,
        )

    def _generator(
        self, name: str, rollout: RolloutConfig, needs: Needs, **others: Any
    ) -> ActorSpec:
        config = self._config
        settings = GeneratorSettings(
            name=name,
            model=config.student.model,
            eos_ids=self._tokens.eos_ids,
            stops=self._tokens.stops,
            max_prompt_tokens=config.data.max_prompt_tokens,
            vocabulary=self._tokens.student,
            backend=config.sync.backend,
            seed=next(self._seeds),
            keeps_kv=config.sync.kv == "keep",
            trust_remote_code=config.run.trust_remote_code,
            lora=config.student.lora if config.sync.lora == "adapter" else None,
        )
        settings = msgspec.structs.replace(settings, **others)
        target = "async_opd.roles.rollout.generator:RolloutGenerator"
        return ActorSpec(target, (settings, rollout, needs), engine=True)

    def _scorer(self, name: str, section: str, which: int | str) -> ActorSpec:
        """A replica of the teacher, or of the reference, in `section`. Raises ConfigError for the
        key of a server's that is not there."""
        config, scorer = self._config, self._config.scorers[section]
        settings = self._scorer_settings(name, section)
        needs = Needs() if section == "reference" else config.objective.needs()
        if scorer.backend == "server":
            key, within_s = key_of(section, scorer), config.timeout.score_s
            args = settings, scorer, needs, which, key, within_s
            return ActorSpec("async_opd.runtime.actor_specs:make_server_teacher", args)
        vllm = scorer.backend == "vllm"
        target = (
            "async_opd.roles.teacher.vllm_teacher:VllmTeacher"
            if vllm
            else "async_opd.roles.teacher.transformers_teacher:TransformersTeacher"
        )
        return ActorSpec(target, (settings, scorer, needs), engine=vllm)

    def _scorer_settings(self, name: str, section: str) -> ScorerSettings:
        """How the teacher, or the reference, in `section` scores."""
        config, scorer = self._config, self._config.scorers[section]
        return ScorerSettings(
            name=name,
            temperature=config.rollout.temperature,
            vocabulary=self._vocabulary(section),
            whole=self._tokens.whole.get(section),
            longest=longest_sequence(section, scorer, config.data, config.rollout)[1],
            eos_ids=self._in_ids_of(section, self._tokens.eos_ids),
            stops=self._texts,
            ends_as=self._tokens.ends_as.get(section, ()),
            max_new_tokens=config.rollout.max_new_tokens,
            as_student=section == "reference",
            section=section,
            trust_remote_code=config.run.trust_remote_code,
        )

    @property
    def _texts(self) -> tuple[str, ...]:
        """Those that end a response."""
        return tuple(stop for stop in self._tokens.stops if isinstance(stop, str))

    def _in_ids_of(self, section: str, ids: Iterable[int]) -> tuple[int, ...]:
        """Write ids of the student's as the scorer in `section` has them."""
        pairs = self._tokens.ends_as.get(section, ())
        return tuple(exchanged(np.array([*ids], np.int32), pairs).tolist())

    def _vocabulary(self, section: str) -> Ids:
        """The student's, in ids of the scorer in `section`."""
        return runs(self._in_ids_of(section, listed(self._tokens.student)))


def make_verifier(
    config: VerifyConfig, tokenizer: str, within_s: float, *stops: str
) -> GroupVerifier:
    """Build the verifier in its actor: the pool, and the student's tokenizer (as JSON) to decode
    by, without torch. `stops` are the texts that end a response."""
    decode = decoding(Tokenizer.from_str(tokenizer), config.special_tokens)
    return GroupVerifier(VerifierPool(config), decode, within_s, stops)


def make_server_teacher(
    settings: ScorerSettings,
    config: TeacherConfig | ReferenceConfig,
    needs: Needs,
    url: str,
    key: Secret | None,
    within_s: float,
) -> "ServerTeacher":
    """Build what asks a server in its actor, to which the key comes as what does not print
    itself."""
    from async_opd.roles.teacher.server.teacher import ServerTeacher

    return ServerTeacher(settings, config, needs, url, key.value if key else None, within_s)
