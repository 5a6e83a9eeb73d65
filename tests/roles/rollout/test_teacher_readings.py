"""A teacher's own template, tokenizer and system message: what it is shown, and where the response
begins in it."""

import json

import datasets
import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from async_opd.core.errors import DataError
from async_opd.core.wire import Group, Needs, Rollout, Span
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.roles.rollout.template import Template
from async_opd.roles.teacher.config import TeacherConfig
from async_opd.roles.teacher.transformers_teacher import TransformersTeacher
from tests.roles.teacher.settings import scorer_settings

CHARACTERS = ["<unk>", "<s>", "<end>", *"0123456789+=?:suad\n"]
OURS = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
CHATML = (  # of two tokens that only the teacher has
    "{{ bos_token }}{% for m in messages %}<|im|>{{ m.role[0] }}\n{{ m.content }}<|me|>\n"
    "{% endfor %}<|im|>a\n{{ hint or '' }}"
)
SHORT = "{{ messages[-1].content }}"
SYSTEMLESS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenizer(*added: str) -> PreTrainedTokenizerFast:
    """One token a character, behind <s>, and `added` ones."""
    vocab = {token: id for id, token in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<end>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": list(added)})
    return made


def own(source: str = CHATML, head: int | None = None, **more) -> TeacherView:
    """A teacher with a template and a tokenizer of its own."""
    template = Template("teacher.chat_template", tokenizer("<|im|>", "<|me|>"), source)
    return TeacherView(template=template, head=head, **more)


@pytest.fixture
def prompts(tmp_path):
    """Makes prompts of `rows` for a teacher of this view; the student reads by `chat`, or the plain
    text."""

    def make(view: TeacherView, *rows: dict, chat: str | None = None, **settings) -> PromptSource:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        student = tokenizer()
        student.chat_template = chat
        data = {"path": str(path), "chat_template": chat is not None} | settings
        config = msgspec.convert(data, DataConfig)
        return PromptSource(config, student, seed=0, views={"": view})

    return make


def row(prompt, **more) -> dict:
    return {"prompt": prompt, "answer": "2", "why": "3"} | more


def said(*messages: str) -> list[dict]:
    """Messages from texts such as "user:1"."""
    parts = (message.partition(":") for message in messages)
    return [{"role": role, "content": content} for role, _, content in parts]


def text_of(ids) -> str:
    return tokenizer("<|im|>", "<|me|>").decode(ids, skip_special_tokens=False)


def test_the_student_reads_the_plain_text_and_the_teacher_its_own_template_and_tokens(prompts):
    (prompt,) = prompts(own(template_args={"hint": "9"}), row("1+1=")).first(1)
    assert text_of(prompt.ids) == "<s>1+1="
    # one <s>: the template's, and none of the tokenizer's
    assert text_of(prompt.teacher_ids) == "<s><|im|>u\n1+1=<|me|>\n<|im|>a\n9"
    assert set(prompt.teacher_ids.tolist()) >= {1, 22, 23} and max(prompt.ids) < 22


def test_the_student_reads_by_its_template_and_the_teacher_by_another(prompts):
    (prompt,) = prompts(own(), row(said("system:0", "user:1+1=")), chat=OURS).first(1)
    assert text_of(prompt.ids) == "s:0\nu:1+1=\na:"
    assert text_of(prompt.teacher_ids) == "<s><|im|>s\n0<|me|>\n<|im|>u\n1+1=<|me|>\n<|im|>a\n"


@pytest.mark.parametrize(
    ("messages", "system", "shown"),
    [
        ("1+1=", "7", "s:7\nu:1+1=\na:"),
        (said("user:1"), "7", "s:7\nu:1\na:"),
        (said("system:0", "user:1"), "7", "s:7\nu:1\na:"),
        (said("developer:0", "user:1"), "7", "s:7\nu:1\na:"),
        (said("user:1", "system:0", "user:2"), "7", "s:7\nu:1\ns:0\nu:2\na:"),
        (said("system:0", "user:1"), "", "s:\nu:1\na:"),
        (said("user:1"), "", "s:\nu:1\na:"),
    ],
)
def test_a_system_message_stands_before_or_in_place_of_the_rows(prompts, messages, system, shown):
    (prompt,) = prompts(TeacherView(system=system), row(messages), chat=OURS).first(1)
    assert text_of(prompt.teacher_ids) == shown
    assert text_of(prompt.ids) != shown


def test_a_context_goes_into_the_teachers_own_template_behind_its_system_message(prompts):
    view = own(system="7", context="{prompt}?{solution}")
    (prompt,) = prompts(view, row("1+1="), solution="why").first(1)
    assert text_of(prompt.ids) == "<s>1+1="
    assert text_of(prompt.teacher_ids) == "<s><|im|>s\n7<|me|>\n<|im|>u\n1+1=?3<|me|>\n<|im|>a\n"


@pytest.mark.parametrize("how", ["survey", "first"])
def test_the_teachers_own_rendering_is_held_to_its_bound_before_the_start(prompts, how):
    # <s>, a mark, "u\n", four of the text, a mark, "\n", a mark, "a\n": 13
    for most, reads in ((13, True), (12, False)):
        view = own(longest=("teacher.max_prompt_tokens", most))
        source = prompts(view, row("1+1="), max_prompt_tokens=5)
        look = source.survey if how == "survey" else lambda source=source: source.first(1)
        if reads:
            look()
            continue
        with pytest.raises(DataError, match=r"row 0: 13 prompt tokens, teacher.max_prompt_tokens"):
            look()


def test_many_rows_are_looked_at_as_they_are_read_one_by_one(prompts):
    rows = [row(f"{n}+1=") for n in range(1100)]
    rows[777] = row("1" * 40 + "=")
    source = prompts(own(longest=("teacher.max_prompt_tokens", 40)), *rows, long_prompt="skip")
    source.survey()
    assert source.usable == 1099
    assert len({len(prompt.teacher_ids) for prompt, _ in zip(source, rows[:9], strict=False)}) > 1


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (own(SYSTEMLESS, system="7"), r"teacher\.chat_template refuses 'prompt': .*no system"),
        (own("{% if false %}{% endif %} "), r"teacher\.chat_template renders 'prompt' as ' '"),
        (own("x"), r"message 1: teacher\.chat_template leaves out a message of role 'user'"),
        (own(head=23), r"holds '<\|me\|>' \(23\); the teacher's head has 23 rows"),
    ],
    ids=["refuses", "nothing", "leaves out", "beyond its head"],
)
def test_what_a_teachers_template_cannot_render_is_said_of_the_row_before_the_start(
    prompts, view, why
):
    with pytest.raises(DataError, match=f"row 0: .*{why}") as e:
        prompts(view, row("1+1=")).survey()
    assert "\n" not in f"{e.value}"


def test_what_is_kept_of_rows_is_of_one_template_only(prompts):
    """A look that is kept on disk is not taken for one by another template."""
    long = ("teacher.max_prompt_tokens", 13)
    prompts(own(longest=long), row("1+1=")).survey()
    with pytest.raises(DataError, match="14 prompt tokens"):
        prompts(own(CHATML + "9", longest=long), row("1+1=")).survey()


@pytest.mark.parametrize(
    "source", [CHATML, SHORT, "{{ bos_token }}" + SHORT], ids=["long", "1", "2"]
)
async def test_scores_are_those_behind_the_teachers_own_rendering(
    prompts, tiny_lm, tmp_path, source
):
    """Sampled and top-k log-probs against a plain forward; the response's ids are the
    student's."""
    model = tiny_lm(vocab_size=24).eval()
    model.save_pretrained(tmp_path / "teacher")
    (prompt,) = prompts(own(source), row("7+15=")).first(1)
    assert len(prompt.teacher_ids) != len(prompt.ids) or source.startswith("{{ bos")
    ids = np.array([4, 5, 2], np.int32)
    rollout = Rollout(
        id="0@0#0",
        ids=ids,
        behaviour_logp=np.full(3, -1, np.float32),
        spans=(Span(version=0, start=0, end=3),),
        truncated=False,
    )
    config = TeacherConfig(model=str(tmp_path / "teacher"))
    teacher = TransformersTeacher(scorer_settings(22), config, Needs(teacher_topk=3))
    causes, (scores,) = await teacher.score(Group(prompt=prompt, rollouts=(rollout,)))
    assert causes == ("",)
    shown = prompt.teacher_ids.tolist()
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*shown, *ids.tolist()]])).logits[0, len(shown) - 1 : -1]
    logp_TV = logits_TV.log_softmax(-1)
    expected = logp_TV.gather(1, torch.tensor(ids).long()[:, None])[:, 0]
    np.testing.assert_allclose(scores.sampled_logp, expected, atol=1e-5)
    top = logp_TV[:, :22].topk(3)  # of what the student has
    np.testing.assert_allclose(scores.topk_logp, top.values, atol=1e-5)
    assert scores.topk_ids.tolist() == top.indices.tolist()
