"""Inputs that a run reads before its actors start: tokenizer, prompts and held-out problems, all
checked.

Importing this takes seconds (transformers, datasets): `launch.run` does it when a run begins, not
at the top of its file.
"""

import asyncio
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import floor
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerFast

from async_opd.config.schema import Config
from async_opd.core.errors import DataError
from async_opd.core.vocabulary import Tokens
from async_opd.core.wire import Prompt
from async_opd.launch.models import (
    check_models,
    check_on_vllm,
    fast,
    heads,
    text_config,
    tokenizer_of,
)
from async_opd.launch.readings import views
from async_opd.launch.vocabulary import read_tokens
from async_opd.roles.rollout.config import source_key
from async_opd.roles.rollout.mixture import Mixture
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.roles.rollout.template import Template
from async_opd.roles.verifier.references import References


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The student's tokenizer, what ids stand for, and the data."""

    tokenizer: PreTrainedTokenizerFast
    tokens: Tokens
    prompts: PromptSource | Mixture
    held_out: list[Prompt]
    heads: dict[str, tuple[int, int]]  # of queries and of keys, of what runs on transformers
    templates: dict[str, Template]  # of teachers that read by their own, by name


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Inputs of an evaluation: the model's tokenizer, ids and context, and the problems."""

    tokenizer: PreTrainedTokenizerFast
    tokens: Tokens
    context: int | None  # None: its config names none
    prompts: list[Prompt]


def read(config: Config) -> Inputs:
    """Read and check what `config` names. Raises DataError naming the key."""
    tokenizer = _tokenizer(config)
    tokens = read_tokens(config, tokenizer)
    check_models(config)
    head = _text_config(config).vocab_size
    shown = views(config, tokenizer)
    prompts = _prompts(config, tokenizer, shown, head)
    held_out = _held_out(config, tokenizer, shown, head)
    check_epochs(config, prompts)
    with ExitStack() as undo:
        undo.callback(prompts.close)
        prompts.survey(_go_on)
        check_epochs(config, prompts)
        undo.pop_all()
    return Inputs(
        tokenizer=tokenizer,
        tokens=tokens,
        prompts=prompts,
        held_out=held_out,
        heads=heads(config),
        templates={name: view.template for name, view in shown.items() if view.template},
    )


def _prompts(
    config: Config, tokenizer: PreTrainedTokenizerFast, shown: dict[str, TeacherView], head: int
) -> PromptSource | Mixture:
    """Load the training rows, of one set or several, as they are `shown` to teachers, for a
    student's head of so many rows."""
    parts = [
        PromptSource(
            data,
            tokenizer,
            seed=config.run.seed,
            views=shown,
            references=References(config.verify),
            head=head,
            key=key,
        )
        for key, data in config.data.sets.items()
    ]
    sources = config.data.sources
    if not sources:
        return parts[0]
    weights = {name: source.weight for name, source in sources.items()}
    return Mixture(dict(zip(sources, parts, strict=True)), weights)


def read_problems(config: Config, count: int | None) -> Problems:
    """Read the first `count` rows of `config.data`, or all, as problems for an evaluation. Raises
    DataError."""
    tokenizer = _tokenizer(config)
    check_on_vllm("student.model", config.student.model, config.run.trust_remote_code)
    model = _text_config(config)
    data = msgspec.structs.replace(config.data, teacher=None, solution=None)
    return Problems(
        tokenizer=tokenizer,
        tokens=read_tokens(config, tokenizer),
        context=getattr(model, "max_position_embeddings", None),
        prompts=PromptSource(
            data,
            tokenizer,
            seed=0,
            references=References(config.verify),
            head=model.vocab_size,
        ).first(count, _go_on),
    )


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Read the tokenizer of the student."""
    args = "student.model", config.student.model, config.run.trust_remote_code
    return fast(*args[:2], tokenizer_of(*args))


def _text_config(config: Config) -> Any:
    """Read the config of the student's text model."""
    return text_config("student.model", config.student.model, config.run.trust_remote_code)


def check_epochs(config: Config, prompts: PromptSource | Mixture) -> None:
    """Refuse fewer usable rows than the steps need, where that can be known before the end of a
    stream."""
    epochs, total = config.data.epochs, config.run.steps * config.groups_per_step
    if not epochs or config.data.streaming:
        return
    for name, part in prompts.parts.items():
        share = prompts.shares[name]
        needed = floor(total * share)
        if epochs * part.usable < needed:
            of = f" of {source_key(name)}" if name else ""
            raise DataError(
                f"data.epochs = {epochs}: {epochs} x {part.usable} rows{of}, but run.steps ="
                f" {config.run.steps} needs {needed}"
            )


def _held_out(
    config: Config, tokenizer: PreTrainedTokenizerFast, shown: dict[str, TeacherView], head: int
) -> list[Prompt]:
    """Read the held-out problems, for a student's head of so many rows, as they are `shown` to
    teachers. Columns that are for teachers only are asked for where a teacher is measured."""
    if config.eval is None:
        return []
    data = msgspec.structs.replace(
        config.data, path=config.eval.path, sources={}, split=config.eval.split, streaming=False
    )
    measured = any(teacher.evaluate for teacher in config.named_teachers.values())
    if not measured:
        data = msgspec.structs.replace(data, teacher=None, solution=None)
    source = PromptSource(
        data,
        tokenizer,
        seed=0,
        views=shown if measured else None,
        references=References(config.verify),
        head=head,
        key="eval.path",
    )
    return source.first(config.eval.problems, _go_on)


def _go_on() -> None:
    """End what reads rows where the task that reads them was cancelled: an interruption waits for
    no look at millions of them."""
    with suppress(RuntimeError):  # no loop: of a plan
        if (task := asyncio.current_task()) and task.cancelling():
            raise asyncio.CancelledError
