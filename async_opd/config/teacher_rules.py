"""Rules for the teachers and the reference of a run. Part of `config`, which knows which of them
there are."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from async_opd.core.errors import ConfigError
from async_opd.objectives import Objective
from async_opd.roles.rollout.config import DataConfig, RolloutConfig
from async_opd.roles.teacher.config import ScorerConfig, TeacherConfig, TeacherSamplingConfig

NAME = re.compile(r"[\w-]+")
CONTEXTS = 0.05  # of a shared card's memory: what CUDA takes of it in each process


class Engines(NamedTuple):
    """A pool of what holds a model: `count` times `each`, set in section `at`."""

    role: str
    at: str
    count: int
    setting: str  # of the count
    each: RolloutConfig | ScorerConfig


def section(name: str) -> str:
    """The section of the teacher of that name; one alone has none."""
    return f"teachers.{name}" if name else "teacher"


def tag(objective: Objective) -> str:
    """How an objective is named in a message."""
    return f"objective.tag = {objective.tag!r}"


def longest_prompt(at: str, scorer: ScorerConfig, data: DataConfig) -> tuple[str, int]:
    """The setting that bounds the prompts of the scorer in section `at`, and its value in
    tokens."""
    if isinstance(scorer, TeacherConfig) and scorer.max_prompt_tokens is not None:
        return f"{at}.max_prompt_tokens", scorer.max_prompt_tokens
    return "data.max_prompt_tokens", data.max_prompt_tokens


def longest_sequence(
    at: str, scorer: ScorerConfig, data: DataConfig, rollout: RolloutConfig
) -> tuple[str, int]:
    """The settings that bound what the scorer in section `at` is given, and their sum in tokens."""
    key, tokens = longest_prompt(at, scorer, data)
    return f"{key} + rollout.max_new_tokens", tokens + rollout.max_new_tokens


def form_rules(
    teacher: TeacherConfig | None, teachers: Mapping, data: DataConfig
) -> Iterator[tuple[bool, str]]:
    """One teacher, or several with a column that tells whose a row is: whether a rule is broken,
    and its message."""
    yield (
        bool(teacher and teachers),
        "teacher: must not stand beside [teachers.NAME]; write one or the other",
    )
    one_or_more = "must be a section [teacher] with model, or sections [teachers.NAME] with model"
    yield not (teacher or teachers), f"teacher: missing; {one_or_more}"
    for name in teachers:
        yield (
            not NAME.fullmatch(name),
            f"teachers.{name!r}: a name must be of letters, digits, - and _",
        )
    column = "the name of the column that holds a row's teacher"
    yield (
        bool(teachers) and data.teacher is None,
        f"data.teacher: missing; must be {column}, with [teachers.NAME]",
    )
    unused = f"data.teacher = {data.teacher!r}: has no effect without sections [teachers.NAME]"
    yield not teachers and data.teacher is not None, unused


def teacher_rules(
    teachers: Mapping[str, TeacherConfig], data: DataConfig, student: str, *, evaluated: bool
) -> Iterator[tuple[bool, str]]:
    """What each teacher, by its section, is and is shown."""
    rendered = {"data": data.template_args} | {at: t.template_args for at, t in teachers.items()}
    for at, args in rendered.items():
        broken = bool(args) and not data.chat_template
        yield (
            broken,
            f"{at}.template_args = {args!r}: has no effect without data.chat_template = true",
        )
    for at, t in teachers.items():
        broken = t.context is not None and not (
            "{prompt}" in t.context and "{solution}" in t.context
        )
        yield broken, f"{at}.context = {t.context!r}: must contain {{prompt}} and {{solution}}"
        broken = t.context is not None and data.solution is None
        yield (
            broken,
            (
                "data.solution: missing; must be the name of the column with the solutions for"
                f" {at}.context"
            ),
        )
        broken = t.max_prompt_tokens is not None and not (t.context or t.template_args)
        unless = f"has no effect without {at}.context or {at}.template_args"
        yield broken, f"{at}.max_prompt_tokens = {t.max_prompt_tokens}: {unless}"
        yield from _update_rules(at, t, student)
        yield t.evaluate and not evaluated, f"{at}.evaluate = true: needs an [eval] section"
    broken = data.solution is not None and not any(t.context for t in teachers.values())
    yield broken, f"data.solution = {data.solution!r}: has no effect without a teacher's context"


def _update_rules(at: str, t: TeacherConfig, student: str) -> Iterator[tuple[bool, str]]:
    update, moves = f"{at}.update = {t.update!r}", t.update != "frozen"
    yield (
        moves and t.backend != "transformers",
        f"{update}: must be 'frozen' with {at}.backend = {t.backend!r}",
    )
    models = f"{at}.model = {t.model!r}: must be student.model = {student!r}"
    yield moves and t.model != student, f"{models}, or {update} has nothing to follow"
    for key, needs in (("update_every_steps", ("ema", "copy")), ("ema_decay", ("ema",))):
        value, default = getattr(t, key), getattr(TeacherConfig(model=t.model), key)
        yield (
            t.update not in needs and value != default,
            f"{at}.{key} = {value}: has no effect with {update}",
        )


def backend_rules(
    scorers: Mapping[str, ScorerConfig],
    data: DataConfig,
    rollout: RolloutConfig,
    objective: Objective,
) -> Iterator[tuple[bool, str]]:
    """What the backend of each scorer, by its section, cannot do."""
    for at, s in scorers.items():
        vllm, size = s.backend == "vllm", s.tensor_parallel_size
        key, tokens = longest_sequence(at, s, data, rollout)
        broken = not vllm and s.batch_tokens < tokens  # vLLM takes it in pieces
        yield broken, f"{at}.batch_tokens = {s.batch_tokens}: must be >= {key} = {tokens}"
        limit = f"must be 1 with {at}.backend = 'vllm', whose log-probs of a prompt ignore it"
        yield (
            vllm and rollout.temperature != 1,
            f"rollout.temperature = {rollout.temperature}: {limit}",
        )
        broken = vllm and isinstance(s, TeacherConfig) and objective.needs().teacher_entropy
        limit = f"must be 'transformers' for {tag(objective)}, which needs the exact entropy"
        yield broken, f"{at}.backend = 'vllm': {limit}"
        broken = not vllm and size > 1
        yield (
            broken,
            f"{at}.tensor_parallel_size = {size}: must be 1 with {at}.backend = 'transformers'",
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
    if share_gpu:
        raise ConfigError("run.share_gpu = true: must be false on a cluster without GPUs")
    if backend == "nccl":
        raise ConfigError("sync.backend = 'nccl': must be 'gloo' on a cluster without GPUs")
    for at, s in scorers.items():
        if (
            s.backend == "vllm"
            and isinstance(s, TeacherConfig)
            and objective.needs().teacher_at_student_ids
        ):
            needs = f"for {tag(objective)}, which has given ids scored: without GPUs vLLM cannot"
            raise ConfigError(f"{at}.backend = 'vllm': must be 'transformers' {needs}")
    for at, role in {"rollout": rollout, **scorers}.items():
        if (size := role.tensor_parallel_size) > 1:
            raise ConfigError(
                f"{at}.tensor_parallel_size = {size}: must be 1 on a cluster without GPUs"
            )


def shared_with_learner(engines: Sequence[Engines]) -> float:
    """What is left of a card for the learner that shares it with them."""
    return round(
        1 - CONTEXTS - sum(pool.count * pool.each.gpu_memory_utilization for pool in engines), 4
    )


def sharing_rules(
    engines: Sequence[Engines], ranks: int, backend: str
) -> Iterator[tuple[bool, str]]:
    """One card for everybody."""
    on = "with run.share_gpu = true"
    yield ranks > 1, f"learner.ranks = {ranks}: must be 1 {on}, NCCL refuses two ranks on one card"
    yield (
        backend == "nccl",
        f"sync.backend = 'nccl': must be 'gloo' {on}, NCCL refuses two ranks on one card",
    )
    for pool in engines:
        size = pool.each.tensor_parallel_size
        yield size > 1, f"{pool.at}.tensor_parallel_size = {size}: must be 1 {on}"
    taken = " + ".join(
        f"{p.count} x {p.at}.gpu_memory_utilization = {p.each.gpu_memory_utilization}"
        for p in engines
    )
    limit = f"must sum to less than {1 - CONTEXTS:g} {on}, the learner has what is left"
    yield shared_with_learner(engines) <= 0, f"{taken}: {limit}"


def sampling_rules(
    sampling: TeacherSamplingConfig, teacher: TeacherConfig | None, rollout: RolloutConfig
) -> Iterator[tuple[bool, str]]:
    """Phased teacher sampling within what is checked of the run."""
    yield teacher is None, "teacher_sampling: needs one [teacher] that answers, not [teachers.NAME]"
    broken = teacher is not None and teacher.update != "frozen"
    yield (
        broken,
        f"teacher_sampling: needs teacher.update = 'frozen', not {teacher and teacher.update!r}",
    )
    first, last = sampling.full_until_step, sampling.until_step
    broken = last < first
    yield (
        broken,
        (
            f"teacher_sampling.until_step = {last}: must be >= teacher_sampling.full_until_step ="
            f" {first}"
        ),
    )
    weight = f"teacher_sampling.weight_end = {sampling.weight_end}"
    unless = f"has no effect with teacher_sampling.until_step = full_until_step = {last}"
    yield last == first and sampling.weight_end != 0, f"{weight}: {unless}"
    tokens, longest = sampling.max_new_tokens or 0, rollout.max_new_tokens
    broken = tokens > longest
    yield (
        broken,
        (
            f"teacher_sampling.max_new_tokens = {tokens}: must be <= rollout.max_new_tokens ="
            f" {longest}"
        ),
    )
