"""Rules for what teachers are shown of a row, and how they read it."""

from collections.abc import Iterator, Mapping

from async_opd.config.teacher_rules import Rule
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.teacher.config import TeacherConfig

TEMPLATE = "data.chat_template = true"
# What transformers' `apply_chat_template` takes itself, and gives to no template.
NOT_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)


def reading_rules(
    teachers: Mapping[str, TeacherConfig], data: DataConfig, student: str
) -> Iterator[Rule]:
    """Yield what each teacher, by its section, may be shown; `student` is the student's model."""
    yield from _argument_rules("data", data.template_args, TEMPLATE, rendered=data.chat_template)
    for section, teacher in teachers.items():
        yield from _view_rules(section, teacher, data, student)


def _argument_rules(
    section: str, args: Mapping[str, object], needs: str, *, rendered: bool
) -> list[Rule]:
    """List what the arguments of a template need."""
    return [
        (
            bool(args) and not rendered,
            f"{section}.template_args = {args!r}: has no effect without {needs}",
        ),
        (
            "chat_template" in args,
            f"{section}.template_args.chat_template: is no argument of a template; set"
            f" {section}.chat_template",
        ),
        *(
            (name in args, f"{section}.template_args.{name}: is no argument of a template")
            for name in NOT_ARGUMENTS
        ),
    ]


def _view_rules(section: str, t: TeacherConfig, data: DataConfig, student: str) -> list[Rule]:
    """List what a teacher that is shown another prompt needs."""
    shows = t.context or t.template_args or t.chat_template or t.system is not None
    rendered = data.chat_template or bool(t.chat_template)
    needs = f"{TEMPLATE} or {section}.chat_template"
    return [
        *_argument_rules(section, t.template_args, needs, rendered=rendered),
        (
            t.system is not None and not rendered,
            f"{section}.system = {t.system!r}: has no effect without {needs}",
        ),
        (
            t.chat_template is True and data.chat_template and t.model == student,
            f"{section}.chat_template = true: has no effect with {section}.model = student.model ="
            f" {student!r}, whose template the student reads by",
        ),
        (
            t.context is not None and not ("{prompt}" in t.context and "{solution}" in t.context),
            f"{section}.context = {t.context!r}: must contain {{prompt}} and {{solution}}",
        ),
        (
            t.context is not None and None in data.columns("solution").values(),
            "data.solution: missing; must be the name of the column with the solutions for"
            f" {section}.context",
        ),
        (
            t.max_prompt_tokens is not None and not shows,
            f"{section}.max_prompt_tokens = {t.max_prompt_tokens}: has no effect without"
            f" {section}.context, {section}.system, {section}.chat_template or"
            f" {section}.template_args",
        ),
    ]
