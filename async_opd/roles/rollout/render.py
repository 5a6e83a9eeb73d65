"""A row as texts: what the student is shown, and what its teacher is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.suggest import wrong
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.messages import shown, usable
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.roles.rollout.template import Template

STUDENT = TeacherView()  # is shown a row as it is
OURS = "data.chat_template = true: the tokenizer of student.model"  # has the template


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row."""

    answer: str
    teacher: str  # its name; "" for one alone
    texts: list[str]  # the student's; the teacher's behind it, where that is another
    bounds: list[tuple[str, int]]  # of each in tokens, after the setting's name

    def over(self, lengths: list[int]) -> str | None:
        """Say which of the `lengths` in tokens is over its bound."""
        for length, (key, limit) in zip(lengths, self.bounds, strict=True):
            if length > limit:
                return f"{length} prompt tokens, {key} = {limit}"
        return None


class Renderer:
    """Renders rows by the student's chat template, or takes them as they are; for a teacher by its
    own where it has one. Each method raises DataError, which says what is wrong of the row, and not
    which it is."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        views: Mapping[str, TeacherView],
    ):
        """Take what each teacher is shown from `views`, by its name."""
        self._config = config
        self._views = views

        def read_by(view: TeacherView) -> Template | None:
            args = config.template_args | view.template_args
            ours = template_of(OURS, tokenizer, args) if config.chat_template else None
            return view.template or ours

        self._template = read_by(STUDENT)
        self._theirs = {name: read_by(view) for name, view in views.items()}

    def check_types(self, row: Mapping[str, Any]) -> None:
        """Look at the types and keys of a row alone, which is quick."""
        self._contents(row)

    def rendered(self, row: Mapping[str, Any]) -> Rendered:
        """Render a row."""
        config, teacher = self._config, self._teacher(row)
        content, theirs = self._contents(row)
        bound, view = ("data.max_prompt_tokens", config.max_prompt_tokens), self._views[teacher]
        texts, bounds = [self._text(content, self._template, STUDENT)], [bound]
        if view.differs:
            texts.append(self._text(theirs, self._theirs[teacher], view))
            bounds.append(view.longest or bound)
        return Rendered(answer=str(row[config.answer]), teacher=teacher, texts=texts, bounds=bounds)

    def _contents(self, row: Mapping[str, Any]) -> tuple[str | list, str | list]:
        """Take what the student is shown of a row, and what the teacher is."""
        config = self._config
        content, answer = row.get(config.prompt), row.get(config.answer)
        if not isinstance(content, str | list) or not content or not str(content).strip():
            raise DataError(
                f"{config.prompt!r} must be a string or a list of messages, and not empty,"
                f" got {shown(content)}"
            )
        if not isinstance(answer, str | int | float) or not _is_finite(answer):
            raise DataError(f"{config.answer!r} must be a string or a number, got {shown(answer)}")
        if isinstance(content, list):
            if not self._template:
                raise DataError(f"{config.prompt!r} holds messages: set data.chat_template = true")
            content = usable(content, config.prompt, self._template.source)
        view = self._views[self._teacher(row)]
        solution = row.get(config.solution) if config.solution else None
        return content, view.shown(content, solution, config.solution)

    def _teacher(self, row: Mapping[str, Any]) -> str:
        """Read the name of the teacher that the row is for."""
        if self._config.teacher is None:
            return ""
        name = row.get(self._config.teacher)
        if not isinstance(name, str) or name not in self._views:
            raise DataError(
                wrong(f"data.teacher, column {self._config.teacher!r}", name, self._views)
            )
        return name

    def _text(self, content: str | list, template: Template | None, view: TeacherView) -> str:
        """Render a content by `template`, or take it as it is where there is none."""
        if template is None:
            assert isinstance(content, str)  # `_contents` refuses messages
            return content
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        args = self._config.template_args | view.template_args
        return template.render(view.addressed(messages), self._config.prompt, args)


def template_of(
    called: str, tokenizer: PreTrainedTokenizerFast, args: Mapping[str, Any]
) -> Template:
    """Take the template that `tokenizer` has for the arguments `args`. Raises DataError as
    `jinja_of` does."""
    return Template(called, tokenizer, jinja_of(called, tokenizer, args), "the chat template")


def jinja_of(called: str, tokenizer: PreTrainedTokenizerBase, args: Mapping[str, Any]) -> str:
    """Read the Jinja text of the template that `tokenizer` has: of several that for tools where
    `args` have some. Raises DataError where it has none, which begins with `called`."""
    if not tokenizer.chat_template:
        raise DataError(f"{called} has no chat template")
    with foreign(called):
        return str(tokenizer.get_chat_template(tools=args.get("tools")))


def _is_finite(answer: str | int | float) -> bool:
    return not isinstance(answer, float) or math.isfinite(answer)
