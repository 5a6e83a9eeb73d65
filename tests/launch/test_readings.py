"""How teachers read: what is refused before anything starts, and what is recorded."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.launch.inputs import read
from async_opd.launch.readings import views
from async_opd.launch.run import _write_beginning
from async_opd.launch.toy_models import resolve_toy
from async_opd.roles.rollout.render import Renderer
from async_opd.toy import STUDENT, TEACHER

PLAIN = "{% for m in messages %}{{ m.content }}={% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)
USER_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture
def demo(tmp_path):
    """The demo with a teacher whose tokenizer has a template and a token that a prompt begins
    with, and the view of it."""
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<pad>"}))

    def make(*overrides: str):
        mine = [f"run.dir={tmp_path}/run", f"teacher.model={folder}", *overrides]
        return resolve_toy(load("configs/demo.toml", mine), tmp_path)

    return make


def view(config):
    return views(config, AutoTokenizer.from_pretrained(STUDENT))[""]


def quoted(text: str) -> str:
    return json.dumps(text)


def test_a_template_is_the_tokenizers_a_text_or_a_file(demo, tmp_path):
    (tmp_path / "own.jinja").write_text(USER_ONLY)
    for setting, source in (
        ("true", PLAIN),
        (quoted(NO_SYSTEM), NO_SYSTEM),
        (quoted(f"{tmp_path}/own.jinja"), USER_ONLY),
    ):
        template = view(demo(f"teacher.chat_template={setting}")).template
        assert template and template.source == source
        assert template.tokenizer.bos_token == "<pad>"  # the teacher's own
    assert view(demo()).template is None


TOOLS = "template_args={tools=[{type='function', function={name='add'}}]}"
SEVERAL = [
    {"name": "default", "template": PLAIN},
    {"name": "tool_use", "template": "{{ tools[0].function.name }}:" + PLAIN},
]


@pytest.mark.parametrize(
    ("settings", "student", "teacher"),
    [
        (["data.chat_template=true"], "1+2=", None),
        (["data.chat_template=true", f"data.{TOOLS}"], "add:1+2=", None),
        (["data.chat_template=true", f"teacher.{TOOLS}"], "1+2=", "add:1+2="),
        (["teacher.chat_template=true", f"teacher.{TOOLS}"], "1+2", "add:1+2="),
    ],
)
def test_of_several_templates_that_for_tools_is_read_by_where_there_are_some(
    demo, tmp_path, settings, student, teacher
):
    shutil.copytree(STUDENT, tmp_path / "student")
    for folder in (tmp_path / "student", tmp_path / "teacher"):
        file = folder / "tokenizer_config.json"
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        content = json.loads(file.read_text()) | {"chat_template": SEVERAL}
        file.write_text(json.dumps(content))
    config = demo(f"student.model={tmp_path}/student", *settings)
    mine = AutoTokenizer.from_pretrained(config.student.model)
    row = {"prompt": "1+2", "answer": "3", "id": "x"}
    rendered = Renderer(config.data, mine, views(config, mine)).rendered(row)
    assert rendered.texts == [text for text in (student, teacher) if text is not None]


REFUSED = {
    "no Jinja": (
        ["teacher.chat_template={% if %}"],
        r"teacher\.chat_template: TemplateSyntaxError: ",
    ),
    "an unknown filter": (
        ["teacher.chat_template={{ messages | nothing }}"],
        r"teacher\.chat_template: TemplateAssertionError: No filter named 'nothing'",
    ),
    "begins twice": (
        [f"teacher.chat_template={'{{ bos_token }}' * 2}{PLAIN}"],
        r"teacher\.chat_template: begins with '<pad>' twice",
    ),
    "refuses a system message": (
        [f"teacher.chat_template={NO_SYSTEM}", "teacher.system=7"],
        r"teacher\.chat_template refuses 'teacher\.system': .*no system role",
    ),
    "refuses it even where it is empty": (
        [f"teacher.chat_template={NO_SYSTEM}", 'teacher.system=""'],
        r"teacher\.chat_template refuses 'teacher\.system': .*no system role",
    ),
    "leaves it out": (
        [f"teacher.chat_template={USER_ONLY}", "teacher.system=7"],
        r"teacher\.system: teacher\.chat_template leaves it out",
    ),
    "the tokenizer has none": (
        ["teacher.model=toy:teacher", "teacher.chat_template=true"],
        r"teacher\.chat_template = true: the tokenizer of teacher\.model has no chat template",
    ),
}


@pytest.mark.parametrize(("overrides", "why"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(demo, overrides, why):
    words = [
        f"{key}={quoted(value) if value[0] not in chr(34) + 't' else value}"
        for key, _, value in (each.partition("=") for each in overrides)
    ]
    with pytest.raises(DataError, match=why) as e:
        view(demo(*words))
    assert "\n" not in f"{e.value}" and e.value.exit_status == 2


def test_a_file_that_is_no_text_is_refused(demo, tmp_path):
    (tmp_path / "own.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(DataError, match=r"teacher\.chat_template = '.*own\.jinja': .*codec"):
        view(demo(f"teacher.chat_template={tmp_path}/own.jinja"))


def test_a_run_reads_by_it_and_says_so(demo, tmp_path):
    template = "{{ '7' * 3 }}" + PLAIN
    inputs = read(demo(f"teacher.chat_template={quoted(template)}"))
    prompt = next(iter(inputs.prompts))
    inputs.prompts.close()
    shown = inputs.tokenizer.decode(prompt.teacher_ids)
    assert shown == f"777{inputs.tokenizer.decode(prompt.ids)}="
    assert inputs.templates[""].source == template
    _write_beginning(tmp_path, None, inputs, resumed=False)
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert recorded["chat_templates"] == {"teacher.chat_template": template}
    assert {text[:3] for text in map(inputs.tokenizer.decode, _shown(inputs))} == {"777"}


def _shown(inputs) -> list:
    """What the teacher is asked of the problems on which it is measured."""
    return [prompt.shown_to_teacher for prompt in inputs.held_out[:9]]


def test_each_of_several_teachers_reads_in_its_own_way(demo, tmp_path):
    toml = Path("configs/demo.toml").read_text().replace("[teacher]", "[teachers.one]")
    toml = toml.replace("[data]", '[data]\nteacher = "kind"')
    (tmp_path / "two.toml").write_text(
        f"{toml}\n[teachers.two]\nmodel = '{tmp_path}/teacher'\nchat_template = true\nsystem = '7'"
    )
    config = resolve_toy(load(tmp_path / "two.toml", [f"run.dir={tmp_path}/run"]), tmp_path)
    both = views(config, AutoTokenizer.from_pretrained(STUDENT))
    assert (both["one"].template, both["one"].differs) == (None, False)
    assert both["two"].template.called == "teachers.two.chat_template"
    assert both["two"].system == "7"
