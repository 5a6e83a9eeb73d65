"""How each teacher reads a prompt, checked before anything starts: its own template, and a system
message that its template takes."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from async_opd.config.schema import Config
from async_opd.config.teacher_rules import longest_prompt, teacher_section
from async_opd.core.errors import DataError
from async_opd.core.foreign import foreign
from async_opd.core.reading import read_named
from async_opd.launch.models import fast, text_config, tokenizer_of
from async_opd.roles.rollout.render import OURS, jinja_of, template_of
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.roles.rollout.template import Template
from async_opd.roles.teacher.config import TeacherConfig

ASKS = [{"role": "user", "content": "?"}]  # the least that a template renders


def views(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, TeacherView]:
    """Say what each teacher is shown of a row, by its name; `tokenizer` is the student's. Raises
    DataError for a template that is none, begins twice, or does not take the system message."""
    shown: dict[str, TeacherView] = {}
    for name, teacher in config.named_teachers.items():
        section, args_of = teacher_section(name), arguments(config, teacher)
        ours = template_of(OURS, tokenizer, args_of) if config.data.chat_template else None
        template, head = None, None
        if teacher.chat_template:
            args = f"{section}.model", teacher.model, config.run.trust_remote_code
            read = tokenizer_of(*args, weights=section not in config.served)
            source = source_of(section, teacher, read, args_of)
            template = _own(f"{section}.chat_template", fast(*args[:2], read), source)
            head = text_config(*args).vocab_size
        shown[name] = TeacherView(
            template=template,
            head=head,
            system=teacher.system,
            template_args=teacher.template_args,
            context=teacher.context,
            longest=longest_prompt(section, teacher, config.data),
        )
        if reads_by := template or ours:
            _refuse_system(f"{section}.system", shown[name], reads_by, args_of)
    return shown


def arguments(config: Config, teacher: TeacherConfig) -> dict[str, Any]:
    """Join the arguments of the template by which `teacher` reads."""
    return config.data.template_args | teacher.template_args


def source_of(
    section: str,
    teacher: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    args: Mapping[str, Any],
) -> str:
    """Read the Jinja text of the template of the teacher in `section`, whose `tokenizer` may have
    it, for the arguments `args`; "" where it reads by the student's. Raises DataError."""
    key = f"{section}.chat_template"
    if teacher.chat_template is True:
        return jinja_of(f"{key} = true: the tokenizer of {section}.model", tokenizer, args)
    if file := teacher.template_file:
        content = read_named(f"{key} = {file!r}", file, DataError)
        with foreign(f"{key} = {file!r}"):
            return content.decode("utf-8-sig")
    return teacher.chat_template or ""


def _own(called: str, tokenizer: PreTrainedTokenizerFast, source: str) -> Template:
    """Make the template that is the teacher's alone. Raises DataError."""
    template = Template(called, tokenizer, source)
    begin = tokenizer.bos_token
    if begin and template.sample.startswith(2 * str(begin)):
        raise DataError(f"{template.called}: begins with {begin!r} twice")
    return template


def _refuse_system(key: str, view: TeacherView, template: Template, args: dict) -> None:
    """Raise DataError for a system message that `template` refuses or leaves out."""
    if view.system is None:
        return
    text = template.render(view.addressed(ASKS), key, args)
    if view.system.strip() not in text:
        raise DataError(f"{key}: {template.called} leaves it out")
