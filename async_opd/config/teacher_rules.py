"""Rules for the teachers and the reference of a run, and what else follows from their sections."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from async_opd.core.errors import ConfigError
from async_opd.objectives import Objective
from async_opd.roles.rollout.config import DataConfig, RolloutConfig
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig, TeacherSamplingConfig

Rule = tuple[bool, str]  # whether it is broken, and a message that names both sides

NAME = re.compile(r"[\w-]+")
CONTEXTS = 0.05  # of a shared card's memory: what CUDA takes of it in each process


class Engines(NamedTuple):
    """A pool of what holds a model: `count` times `each`, set in `section`."""

    role: str
    section: str
    count: int
    setting: str  # of the count
    each: RolloutConfig | ScorerConfig


def refuse_broken(rules: Iterable[Rule]) -> None:
    """Raise ConfigError for the first rule that is broken."""
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def teacher_section(name: str) -> str:
    """Name the section of the teacher of that name; one alone has none."""
    return f"teachers.{name}" if name else "teacher"


def tag(objective: Objective) -> str:
    """Name an objective as messages do."""
    return f"objective.tag = {objective.tag!r}"


def longest_prompt(section: str, scorer: ScorerConfig | None, data: DataConfig) -> tuple[str, int]:
    """Find the setting that bounds the prompts of the scorer in `section`, or of the student where
    there is none, and its value in tokens."""
    if isinstance(scorer, TeacherConfig) and scorer.max_prompt_tokens is not None:
        return f"{section}.max_prompt_tokens", scorer.max_prompt_tokens
    return "data.max_prompt_tokens", data.max_prompt_tokens


def longest_sequence(
    section: str, scorer: ScorerConfig | None, data: DataConfig, rollout: RolloutConfig
) -> tuple[str, int]:
    """Find the settings that bound the sequences of the scorer in `section`, or of the student, and
    their sum in tokens."""
    key, tokens = longest_prompt(section, scorer, data)
    return f"{key} + rollout.max_new_tokens", tokens + rollout.max_new_tokens


def form_rules(teacher: TeacherConfig | None, teachers: Mapping[str, TeacherConfig]) -> list[Rule]:
    """List that there is one teacher, or several with names."""
    return [
        (
            bool(teacher and teachers),
            "teacher: must not stand beside [teachers.NAME]; write one or the other",
        ),
        (
            not (teacher or teachers),
            "teacher: missing; must be a section [teacher] with model, or sections [teachers.NAME]"
            " with model",
        ),
        *(
            (
                not NAME.fullmatch(name),
                f"teachers.{name!r}: a name must be of letters, digits, - and _",
            )
            for name in teachers
        ),
    ]


def teacher_rules(
    teachers: Mapping[str, TeacherConfig], student: str, *, evaluated: bool
) -> Iterator[Rule]:
    """Yield what each teacher, by its section, may be."""
    for section, teacher in teachers.items():
        yield from _update_rules(section, teacher, student)
        yield (
            teacher.evaluate and not evaluated,
            f"{section}.evaluate = true: needs an [eval] section",
        )


def _update_rules(section: str, t: TeacherConfig, student: str) -> Iterator[Rule]:
    """Yield what a self-teacher that follows the student needs."""
    update, moves = f"{section}.update = {t.update!r}", t.update != "frozen"
    yield (
        moves and t.backend != "transformers",
        f"{update}: must be 'frozen' with {section}.backend = {t.backend!r}",
    )
    yield (
        moves and t.model != student,
        f"{section}.model = {t.model!r}: must be student.model = {student!r}, or {update} has"
        " nothing to follow",
    )
    for key, needs in (("update_every_steps", ("ema", "copy")), ("ema_decay", ("ema",))):
        value, default = getattr(t, key), getattr(TeacherConfig(model=t.model), key)
        yield (
            t.update not in needs and value != default,
            f"{section}.{key} = {value}: has no effect with {update}",
        )


def backend_rules(
    scorers: Mapping[str, ScorerConfig],
    data: DataConfig,
    rollout: RolloutConfig,
    objective: Objective,
) -> Iterator[Rule]:
    """Yield what the backend of each scorer, by its section, cannot do."""
    for section, s in scorers.items():
        vllm, plain = s.backend in ("vllm", "server"), s.backend == "transformers"
        size = s.tensor_parallel_size
        key, tokens = longest_sequence(section, s, data, rollout)
        yield (
            plain and s.batch_tokens < tokens,  # vLLM takes it in pieces
            f"{section}.batch_tokens = {s.batch_tokens}: must be >= {key} = {tokens}",
        )
        yield (
            vllm and rollout.temperature != 1,
            f"rollout.temperature = {rollout.temperature}: must be 1 with {section}.backend ="
            f" {s.backend!r}, whose log-probs of a prompt ignore it",
        )
        yield (
            vllm and isinstance(s, TeacherConfig) and objective.needs().teacher_entropy,
            f"{section}.backend = {s.backend!r}: must be 'transformers' for {tag(objective)}, which"
            " needs the exact entropy",
        )
        yield (
            plain and size > 1,
            f"{section}.tensor_parallel_size = {size}: must be 1 with {section}.backend ="
            " 'transformers'",
        )


def refuse_without_gpus(
    scorers: Mapping[str, ScorerConfig],
    rollout: RolloutConfig,
    objective: Objective,
    share_gpu: bool,
    backend: str,
) -> None:
    """Raise ConfigError for what needs GPUs. Called on a cluster that has none, which only the
    cluster can tell."""
    without = "on a cluster without GPUs"
    given_ids = objective.needs().teacher_at_student_ids > 0
    refuse_broken(
        [
            (share_gpu, f"run.share_gpu = true: must be false {without}"),
            (backend == "nccl", f"sync.backend = 'nccl': must be 'gloo' {without}"),
            *(
                (
                    given_ids and s.backend == "vllm" and isinstance(s, TeacherConfig),
                    f"{section}.backend = 'vllm': must be 'transformers' for {tag(objective)},"
                    " which has given ids scored: without GPUs vLLM cannot",
                )
                for section, s in scorers.items()
            ),
            *(
                rule
                for section, role in {"rollout": rollout, **scorers}.items()
                for rule in (
                    (
                        role.tensor_parallel_size > 1,
                        f"{section}.tensor_parallel_size = {role.tensor_parallel_size}: must be 1"
                        f" {without}",
                    ),
                    (
                        "speculative_config" in role.engine,
                        f"{section}.engine.speculative_config: must be absent {without}, where"
                        " vLLM's log-probs of what was speculated are of other logits",
                    ),
                )
            ),
        ]
    )


def shared_with_learner(engines: Sequence[Engines]) -> float:
    """Compute what is left of a card for the learner that shares it with `engines`."""
    taken = sum(pool.count * pool.each.gpu_memory_utilization for pool in engines)
    return round(1 - CONTEXTS - taken, 4)


def sharing_rules(engines: Sequence[Engines], ranks: int, backend: str) -> list[Rule]:
    """List what one card for everybody asks for."""
    on = "with run.share_gpu = true"
    taken = " + ".join(
        f"{pool.count} x {pool.section}.gpu_memory_utilization = {pool.each.gpu_memory_utilization}"
        for pool in engines
    )
    return [
        (ranks > 1, f"learner.ranks = {ranks}: must be 1 {on}, NCCL refuses two ranks on one card"),
        (
            backend == "nccl",
            f"sync.backend = 'nccl': must be 'gloo' {on}, NCCL refuses two ranks on one card",
        ),
        *(
            (
                pool.each.tensor_parallel_size > 1,
                f"{pool.section}.tensor_parallel_size = {pool.each.tensor_parallel_size}: must be 1"
                f" {on}",
            )
            for pool in engines
        ),
        (
            shared_with_learner(engines) <= 0,
            f"{taken}: must sum to less than {1 - CONTEXTS:g} {on}, the learner has what is left",
        ),
    ]


def sampling_rules(
    sampling: TeacherSamplingConfig, teacher: TeacherConfig | None, rollout: RolloutConfig
) -> list[Rule]:
    """List what phased teacher sampling asks of the rest of the run."""
    first, last = sampling.full_until_step, sampling.until_step
    tokens, longest = sampling.max_new_tokens or 0, rollout.max_new_tokens
    return [
        (
            teacher is None,
            "teacher_sampling: needs one [teacher] that answers, not [teachers.NAME]",
        ),
        (
            teacher is not None and teacher.update != "frozen",
            "teacher_sampling: needs teacher.update = 'frozen', not"
            f" {teacher and teacher.update!r}",
        ),
        (
            last < first,
            f"teacher_sampling.until_step = {last}: must be >= teacher_sampling.full_until_step ="
            f" {first}",
        ),
        (
            last == first and sampling.weight_end != 0,
            f"teacher_sampling.weight_end = {sampling.weight_end}: has no effect with"
            f" teacher_sampling.until_step = full_until_step = {last}",
        ),
        (
            tokens > longest,
            f"teacher_sampling.max_new_tokens = {tokens}: must be <= rollout.max_new_tokens ="
            f" {longest}",
        ),
    ]
