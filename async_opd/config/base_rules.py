"""Rules for scorers that are the student's frozen base: they live in the learner's ranks, of which
nothing is asked but forwards."""

from collections.abc import Iterator

import msgspec

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import Rule, longest_sequence
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig

ELSEWHERE = {"backend", "engine", "urls", "key_env"}  # looked at by other rules
# of [teacher], which the engines of [teacher_sampling] take from it
OF_ENGINES = {"dtype", "tensor_parallel_size", "memory_gib", "gpu_memory_utilization"}


def base_rules(c: Config) -> Iterator[Rule]:
    """Yield what a scorer with backend = "learner", by its section, may be."""
    for section, scorer in c.in_learner.items():
        backend, model = f"{section}.backend = 'learner'", c.models[section]
        yield (
            c.student.lora is None,
            f"{backend}: needs student.lora; without an adapter the learner keeps nothing of what"
            " its student was",
        )
        yield (
            model != c.student.model,
            f"{section}.model = {model!r}: must be student.model = {c.student.model!r} with"
            f" {backend}",
        )
        yield (
            isinstance(scorer, TeacherConfig) and scorer.evaluate,
            f"{section}.evaluate = true: must be false with {backend}, for the learner generates"
            " nothing",
        )
        yield from _effect_rules(section, scorer, answers=c.teacher_sampling is not None)
        key, tokens = longest_sequence(section, scorer, c.data, c.rollout)
        yield (
            c.learner.micro_batch_tokens < tokens,
            f"learner.micro_batch_tokens = {c.learner.micro_batch_tokens}: must be >= {key} ="
            f" {tokens} with {backend}",
        )


def _effect_rules(section: str, scorer: ScorerConfig, *, answers: bool) -> Iterator[Rule]:
    """Yield that settings of a pool are not set, where the scorer that `answers` prompts has no use
    for them either. The table `engine` is looked at with the other tables, addresses and their key
    with those of servers, which show no secret."""
    used = ELSEWHERE | (OF_ENGINES if answers and section == "teacher" else set())
    for field in msgspec.structs.fields(ScorerConfig):
        value = getattr(scorer, field.name)
        yield (
            field.name not in used and value != field.default,
            f"{section}.{field.name} = {value}: has no effect with {section}.backend = 'learner',"
            " which scores as [learner] is set",
        )
