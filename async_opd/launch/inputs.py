"""Inputs that a run reads before its actors start: tokenizer, prompts and held-out problems, all
checked.

Importing this takes seconds (transformers, datasets): `launch.run` does it when a run begins, not
at the top of its file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_prompt, teacher_section
from async_opd.core.errors import DataError, first_line
from async_opd.core.wire import Prompt
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView

FILES_OF_MODELS = {
    "weights": ("*.safetensors", "*.bin"),
    "tokenizer": ("tokenizer*", "vocab*", "*.model", "tekken.json"),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The student's tokenizer, the ids that end a response, and the data."""

    tokenizer: PreTrainedTokenizerFast
    eos_ids: list[int]
    prompts: PromptSource
    held_out: list[Prompt]


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Inputs of an evaluation: the model's tokenizer, end ids and context, and the problems."""

    tokenizer: PreTrainedTokenizerFast
    eos_ids: list[int]
    context: int | None  # None: its config names none
    prompts: list[Prompt]


def read(config: Config) -> Inputs:
    """Read and check what `config` names. Raises DataError naming the key."""
    tokenizer, eos = _student(config)
    check_scorers(config, tokenizer)
    if config.teacher_sampling:
        check_ends(config)
    prompts = PromptSource(config.data, tokenizer, seed=config.run.seed, views=views(config))
    check_epochs(config, prompts)
    return Inputs(
        tokenizer=tokenizer, eos_ids=eos, prompts=prompts, held_out=_held_out(config, tokenizer)
    )


def read_problems(config: Config, count: int | None) -> Problems:
    """Read the first `count` rows of `config.data`, or all, as problems for an evaluation. Raises
    DataError."""
    tokenizer, eos = _student(config)
    model = _load(
        "student.model", AutoConfig, config.student.model, config.run.trust_remote_code
    ).get_text_config()
    data = msgspec.structs.replace(config.data, teacher=None, solution=None)
    return Problems(
        tokenizer=tokenizer,
        eos_ids=eos,
        context=getattr(model, "max_position_embeddings", None),
        prompts=PromptSource(data, tokenizer, seed=0).first(count),
    )


def _student(config: Config) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Read the tokenizer and the end ids of the student."""
    args = "student.model", config.student.model, config.run.trust_remote_code
    return _tokenizer(*args), eos_ids(*args)


def views(config: Config) -> dict[str, TeacherView]:
    """Say what each teacher is shown of a row, by its name."""
    return {
        name: TeacherView(
            template_args=teacher.template_args,
            context=teacher.context,
            longest=longest_prompt(teacher_section(name), teacher, config.data),
        )
        for name, teacher in config.named_teachers.items()
    }


def _tokenizer(key: str, model: str, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model that can be loaded too. Where its files are missing
    transformers makes one of next to no words."""
    folder = Path(model)
    for what, names in FILES_OF_MODELS.items():
        if folder.is_dir() and not any(file for name in names for file in folder.glob(name)):
            raise DataError(f"{key} = {model!r}: holds no {what} ({', '.join(names)})")
    _load(key, AutoConfig, model, trust_remote_code)
    return _load(key, AutoTokenizer, model, trust_remote_code)


def _load(
    key: str, kind: type[AutoConfig] | type[AutoTokenizer], model: str, trust_remote_code: bool
) -> Any:
    try:
        return kind.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise DataError(f"{key} = {model!r}: {first_line(e)}") from e


def check_epochs(config: Config, prompts: PromptSource) -> None:
    """Refuse fewer rows than the steps need, where that can be known before the end of a stream."""
    epochs, needed = config.data.epochs, config.run.steps * config.groups_per_step
    if epochs and not config.data.streaming and epochs * len(prompts) < needed:
        raise DataError(
            f"data.epochs = {epochs}: {epochs} x {len(prompts)} rows, but run.steps ="
            f" {config.run.steps} needs {needed}"
        )


def check_scorers(config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a teacher or reference whose tokens mean something else, or that cannot score all of
    them."""
    ours = tokenizer.get_vocab()
    for section in config.scorers:
        key, model = f"{section}.model", config.models[section]
        args = model, config.run.trust_remote_code
        theirs = _tokenizer(key, *args).get_vocab()
        if ours != theirs:
            differ = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
            raise DataError(
                f"{key} = {model!r}: its tokenizer disagrees with the student's on {len(differ)}"
                f" tokens, such as {differ[0]!r} (student {ours.get(differ[0])}, {section}"
                f" {theirs.get(differ[0])})"
            )
        size = _load(key, AutoConfig, *args).vocab_size
        if size < len(tokenizer):
            raise DataError(f"{key} = {model!r}: {size} logits for {len(tokenizer)} tokens")
    needs = config.objective.needs()
    likeliest = max(
        needs.teacher_topk, needs.teacher_at_student_ids if needs.student_ids == "likeliest" else 0
    )
    if likeliest > len(tokenizer):
        raise DataError(f"objective.k = {likeliest}: the vocabulary has {len(tokenizer)}")


def check_ends(config: Config) -> None:
    """Refuse a teacher that is to answer prompts, but ends its answers by a token that ends none of
    the student's."""
    ours, theirs = (
        set(eos_ids(f"{section}.model", config.models[section], config.run.trust_remote_code))
        for section in ("student", "teacher")
    )
    if not theirs <= ours:
        raise DataError(
            f"teacher.model = {config.models['teacher']!r}, with [teacher_sampling]: its answers"
            f" end by tokens {sorted(theirs)}, the student's by {sorted(ours)}"
        )


def eos_ids(key: str, model: str, trust_remote_code: bool) -> list[int]:
    """Read the ids that end a response of `model`, from its generation config (they hold one id or
    several)."""
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        eos = _load(key, AutoConfig, model, trust_remote_code).eos_token_id
    if eos is None:
        raise DataError(f"{key} = {model!r}: no eos_token_id in its generation config or config")
    return [eos] if isinstance(eos, int) else list(eos)


def _held_out(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Read the held-out problems. Columns that are for teachers only are asked for where a teacher
    is measured."""
    if config.eval is None:
        return []
    data = msgspec.structs.replace(
        config.data, path=config.eval.path, split=config.eval.split, streaming=False
    )
    measured = any(teacher.evaluate for teacher in config.named_teachers.values())
    if not measured:
        data = msgspec.structs.replace(data, teacher=None, solution=None)
    shown = views(config) if measured else None
    return PromptSource(data, tokenizer, seed=0, views=shown).first(config.eval.problems)
