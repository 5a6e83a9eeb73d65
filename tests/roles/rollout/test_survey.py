"""Rows that cannot be used: each kind is named before anything starts, or left out, or, of a
stream, met when it is read."""

import json
import threading
from itertools import islice

import datasets
import msgspec
import pytest
from transformers import AutoTokenizer

from async_opd.core.errors import DataError
from async_opd.roles.rollout import survey
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.roles.verifier.config import VerifyConfig
from async_opd.roles.verifier.references import References
from async_opd.toy import STUDENT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDING = "{% for m in messages %}{{ m['content'] + '' }}{% endfor %}"
ALTERNATING = (  # Mistral's and Gemma's kind
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] }}"
    "{% endfor %}"
)
KNOWING = (  # writes what it knows, and leaves out the rest in silence
    "{% for m in messages %}{% if m.role == 'user' %}u{{ m.content }}{% elif m.role == 'assistant'"
    " %}a{{ m.content }}{% elif m.role == 'ipython' %}i{{ m.content }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "adding": ADDING, "alternating": ALTERNATING, "parts": PARTS}
CONTEXT = TeacherView(context="{prompt}={solution}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "async_opd_rows"


@pytest.fixture
def source(tmp_path):
    def make(rows, chat=None, views=None, check=None, seed=0, **settings) -> PromptSource:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tokenizer = AutoTokenizer.from_pretrained(STUDENT)
        tokenizer.chat_template = chat
        data = {"path": str(path), "chat_template": chat is not None} | settings
        references = References(VerifyConfig(check=check)) if check else None
        return PromptSource(
            msgspec.convert(data, DataConfig),
            tokenizer,
            seed=seed,
            views=views,
            references=references,
        )

    return make


def said(content, role="user", **more) -> list[dict]:
    return [{"role": role, "content": content, **more}]


def good(n: int, chat: bool) -> dict:
    text = f"{n}+1="
    return {
        "prompt": said(text) if chat else text,
        "answer": str(n + 1),
        "why": "9",
        "name": f"r{n}",
    }


def rows_with(bad: dict, chat: bool, place: int = 50, count: int = 64) -> list[dict]:
    return [good(n, chat) | (bad if n == place else {}) for n in range(count)]


# what the row has; settings; what the line says of it
RAW = {
    "null prompt": ({"prompt": None}, {}, "'prompt' must be a string or a list of messages"),
    "empty prompt": ({"prompt": ""}, {}, "'prompt' must be a string or a list of messages"),
    "blank prompt": ({"prompt": " \n"}, {}, "'prompt' must be a string or a list of messages"),
    "number": ({"prompt": 7}, {}, "got 7"),
    "messages": ({"prompt": said("1+1=")}, {}, "set data.chat_template = true"),
    "long": ({"prompt": "1" * 30}, {"max_prompt_tokens": 12}, "30 prompt tokens"),
    "null answer": ({"answer": None}, {}, "'answer' must be a string or a number, got None"),
    "empty answer": (
        {"answer": ""},
        {"check": "math"},
        "'answer': reference answer '' does not parse",
    ),
    "empty box": ({"answer": r"\boxed{}"}, {"check": "math"}, "does not parse"),
    "list answer": ({"answer": ["2"]}, {}, "'answer' must be a string or a number, got ['2']"),
    "object answer": ({"answer": {"a": 1}}, {}, "'answer' must be a string or a number, got {"),
    "no solution": (
        {"why": None},
        {"solution": "why", "views": {"": CONTEXT}},
        "'why' must be a string that is not empty or a number, got None",
    ),
    "null id": ({"name": None}, {"id": "name"}, "'name' must be a string or an integer, got None"),
    "teacher": (
        {"why": "8"},
        {"teacher": "why", "views": {"9": TeacherView()}},
        "data.teacher, column 'why' = '8': must be '9'",
    ),
}
CHAT = {
    "null content": (said(None), "chatml", "message 1: content must be a text, or a list of parts"),
    "null content, added": (said(None), "adding", "content must be a text"),
    "number": (said(7), "chatml", "content must be a text, or a list of parts"),
    "object": (said({"text": "x"}), "chatml", "content must be a text, or a list of parts"),
    "words": (said(["x"]), "parts", "got the part 'x'"),
    "image": (said([{"type": "image", "text": "x"}]), "parts", "got the part {'type': 'image'"),
    "empty list": (said([]), "parts", "content must be a text, or a list of parts"),
    "parts, printed": (
        said([{"type": "text", "text": "1+1="}]),
        "chatml",
        "the chat template does not render a list of parts: make it one text",
    ),
    "parts, added": (said([{"type": "text", "text": "1+1="}]), "adding", "TypeError: "),
    "no text": (said(""), "chatml", "'prompt' holds messages without any text"),
    "no messages": ([], "chatml", "and not empty, got []"),
    "no role": ([{"content": "1+1="}], "chatml", "must have role and content"),
    "no content": ([{"role": "user"}], "chatml", "content"),
    "role": (said("1+1=", "human"), "chatml", "message 1: role = 'human': must be 'system', "),
    "null role": (said("1+1=", None), "chatml", "must have role and content"),
    "refused": (
        said("1+1=") + said("2+2="),
        "alternating",
        "the chat template refuses 'prompt': TemplateError: Conversation roles must alternate",
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_bad_row_is_named_before_anything_starts(source, kind):
    bad, settings, message = RAW[kind]
    prompts = source(rows_with(bad, False), **settings)
    with pytest.raises(DataError) as raised:
        prompts.survey()
    line = str(raised.value)
    named = "None" if kind == "null id" else "r50" if "id" in settings else "50"
    assert f"rows.jsonl': row {named}: " in line and message in line
    assert ('data.long_prompt = "skip"' if kind == "long" else 'data.bad_rows = "skip"') in line


@pytest.mark.parametrize("kind", CHAT)
def test_bad_messages_are_named_before_anything_starts(source, kind):
    messages, template, message = CHAT[kind]
    prompts = source(rows_with({"prompt": messages}, True), chat=TEMPLATES[template])
    with pytest.raises(DataError) as raised:
        prompts.survey()
    assert "rows.jsonl': row 50: " in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("messages", "template", "rendered"),
    [
        (said([{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]), PARTS, "1+1="),
        (said("1+1=") + said(None, "assistant", tool_calls=[{"x": 1}]), ADDING, "1+1="),
        (said("9", "system") + said("1+1="), ADDING, "91+1="),
        (said("8", "ipython"), KNOWING, "i8"),
    ],
)
def test_what_a_template_renders_is_taken(source, messages, template, rendered):
    prompts = source(rows_with({"prompt": messages}, True, place=0, count=4), chat=template)
    prompts.survey()
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    expected = tokenizer(rendered, add_special_tokens=False).input_ids
    assert prompts.first(1)[0].ids.tolist() == expected


@pytest.mark.parametrize("template", ["{{ '' }}", "  \n{% for m in messages %}{% endfor %}"])
def test_a_rendering_without_a_text_is_no_prompt(source, template):
    with pytest.raises(DataError, match=r"rows 0, 1: the chat template renders 'prompt' as "):
        source([good(0, True), good(1, True)], chat=template).survey()


def test_a_message_that_a_template_leaves_out_is_named(source):
    rows = rows_with({"prompt": said("9", "developer") + said("1+1=")}, True)
    with pytest.raises(DataError, match=r"row 50: 'prompt', message 1: .* leaves out a message of"):
        source(rows, chat=KNOWING).survey()


def test_the_teacher_s_rendering_is_judged_too(source):
    rows = rows_with({"why": "9" * 9}, False)
    view = TeacherView(context="{prompt}{solution}", longest=("teacher.max_prompt_tokens", 8))
    with pytest.raises(DataError, match=r"row 50: 14 prompt tokens, teacher.max_prompt_tokens = 8"):
        source(rows, solution="why", views={"": view}).survey()


@pytest.mark.parametrize("count", [3, 10, 11, 30])
def test_the_first_ten_are_named_at_once_with_their_number_and_all_in_a_file(source, count, cache):
    rows = [good(n, False) | ({"answer": None} if n < count else {}) for n in range(64)]
    with pytest.raises(DataError) as raised:
        source(rows).survey()
    line = str(raised.value)
    assert (
        f"{count} of 64 rows cannot be used: rows {', '.join(map(str, range(min(count, 10))))}: "
        in line
    )
    files = list(cache.glob("refused-*"))
    assert len(files) == (count > 10)
    for file in files:
        assert f"; and {count - 10} more, all of them in {file}" in line
        assert [json.loads(row)["place"] for row in file.read_text().splitlines()] == [
            *range(count)
        ]


SKIP = {"check": "math", "bad_rows": "skip", "long_prompt": "skip", "max_prompt_tokens": 12}
SOME_BAD = [
    good(n, False)
    | {3: {"answer": None}, 5: {"prompt": ""}, 6: {"prompt": "1" * 30}, 7: {"answer": ""}}.get(
        n, {}
    )
    for n in range(10)
]


@pytest.mark.parametrize("surveyed", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_left_out_and_counted_and_a_continuation_stays_whole(source, streaming, surveyed):
    settings = SKIP | dict(rows=SOME_BAD, id="name", streaming=streaming)

    def read() -> PromptSource:
        prompts = source(**settings)
        if surveyed:
            prompts.survey()
        return prompts

    # a reference is judged by a survey alone
    usable = 6 if surveyed and not streaming else 7
    prompts = read()
    told = []
    prompts.tell = told.append
    unbroken = [prompt.id for prompt in islice(prompts, 3 * usable)]
    next(iter(prompts))
    assert len(set(unbroken)) == 3 * usable
    assert sorted(unbroken[:usable]) == [
        f"r{n}@0" for n in (0, 1, 2, 4, 7, 8, 9) if n != 7 or usable == 7
    ]
    assert (prompts.skipped, prompts.left_out) >= (3, 3 * (9 - usable))
    assert len(told) == (0 if surveyed and not streaming else 3)  # once a row, not once an epoch
    first = read()
    list(islice(first, 8))
    after = read()
    rest = after.continued(json.loads(json.dumps(first.position)), [])
    assert [prompt.id for prompt in islice(rest, 3 * usable - 8)] == unbroken[8:]


def test_what_is_left_out_does_not_count_as_rows_of_an_epoch(source):
    prompts = source(SOME_BAD, **SKIP)
    prompts.survey()
    assert (len(prompts), prompts.usable) == (10, 6)
    assert prompts.left_out_words.startswith(
        f"4 of 10 rows of {prompts._config.path}, the first: row 3: "
    )


def test_a_set_without_a_usable_row_is_refused_before_anything_starts(source):
    with pytest.raises(DataError, match="no usable row"):
        source([good(0, False) | {"answer": None}], bad_rows="skip").survey()


def test_a_bad_row_of_a_stream_is_met_behind_those_before_it_and_comes_again(source):
    rows = rows_with({"answer": None}, False, place=5, count=8)
    prompts = source(rows, streaming=True, shuffle_buffer=1)
    prompts.survey()  # nothing is read ahead
    reading = iter(prompts)
    assert [prompt.id for prompt in islice(reading, 5)] == [f"{n}@0" for n in range(5)]
    with pytest.raises(DataError, match=r"rows.jsonl': row 5: 'answer' must be"):
        next(reading)
    assert prompts.position["drawn"] == 5
    mended = source(rows_with({}, False, count=8), streaming=True, shuffle_buffer=1)
    assert next(mended.continued(prompts.position, [])).id == "5@0"


@pytest.mark.parametrize("id", [None, "", 0.5])
def test_an_id_of_a_streamed_row_that_is_none_is_met_too(source, id):
    rows = [good(n, False) | {"name": id} for n in range(2)]
    reading = iter(source(rows, id="name", streaming=True, shuffle_buffer=1))
    with pytest.raises(DataError, match=f"'name' must be a string or an integer, got {id!r};"):
        next(reading)


@pytest.mark.parametrize(("id", "shown"), [("a\nb\r\n c", "a b c"), ("x" * 999, "x" * 100)])
def test_a_row_is_named_on_one_line_of_bounded_length(source, id, shown):
    rows = [good(0, False) | {"name": id, "answer": None}]
    for name in (source(rows, id="name").survey, lambda: source(rows, id="name").first(1)):
        with pytest.raises(DataError, match=f": row {shown}: 'answer' must be"):
            name()


def test_problems_of_an_evaluation_that_are_left_out_are_said(source, capfd):
    prompts = source(SOME_BAD, **SKIP)
    prompts.first(5)
    assert capfd.readouterr().out.count("4 rows left out, the first: row 3: ") == 1
    source([good(n, False) for n in range(5)], **SKIP).first(5)
    assert not capfd.readouterr().out


@pytest.mark.parametrize("streaming", [True, False])
def test_problems_of_an_evaluation_are_judged_in_the_same_way(source, streaming):
    with pytest.raises(DataError) as raised:
        source(SOME_BAD, check="math", streaming=streaming, max_prompt_tokens=12).first(8)
    line = str(raised.value)
    assert "4 of 8 rows cannot be used: row 3: " in line and "; row 7: 'answer': reference" in line
    skipping = source(SOME_BAD, streaming=streaming, **SKIP)
    assert [prompt.id for prompt in skipping.first(5)] == ["0@0", "1@0", "2@0", "4@0", "8@0"]
    assert (skipping.skipped, skipping.left_out) == (1, 3)


@pytest.mark.parametrize("streaming", [True, False])
def test_an_id_that_comes_again_behind_rows_that_are_left_out_is_no_second_problem(
    source, streaming
):
    names = ["a", "b", "a", "c", "b", "d"]
    rows = [good(n, False) | {"name": name} for n, name in enumerate(names)]
    rows[1]["answer"] = None
    settings = dict(id="name", streaming=streaming)
    prompts = source(rows, **settings, **SKIP)
    assert [prompt.id for prompt in prompts.first(3)] == ["a@0", "c@0", "d@0"]
    assert prompts.left_out == 3
    rows[1]["prompt"] += "1" * 99  # too long, which alone is left out
    rows[1]["answer"] = "1"
    long_alone = source(rows, **settings, **SKIP | {"bad_rows": "error"})
    with pytest.raises(DataError, match="row a: its id 'name' is also that of"):
        long_alone.first(3)


def test_the_second_look_at_the_same_rows_judges_none(source, monkeypatch):
    def judged(self):
        raise RuntimeError("judged again")

    first = source(SOME_BAD, **SKIP)
    first.survey()
    with monkeypatch.context() as patch:
        patch.setattr(survey.Survey, "_scan", judged)
        again = source(SOME_BAD, **SKIP)
        again.survey()
        assert again.left_out_words == first.left_out_words
        with pytest.raises(DataError, match="judged again"):  # by another bound
            source(SOME_BAD, **SKIP | {"max_prompt_tokens": 11}).survey()
        with pytest.raises(DataError, match="judged again"):  # another row
            source([*SOME_BAD, good(10, False)], **SKIP).survey()


def test_what_is_not_looked_at_in_time_is_looked_at_beside_and_said(source, monkeypatch, capsys):
    rows = rows_with({"answer": None}, False)
    monkeypatch.setattr("async_opd.roles.rollout.prompts.SURVEY_S", 0.0)
    scan, go_on = survey.Survey._scan, threading.Event()
    monkeypatch.setattr(survey.Survey, "_scan", lambda self: go_on.wait() and scan(self))
    prompts = source(rows)
    prompts.survey()
    go_on.set()
    assert (
        "of 64 rows looked at after 0 s; the others beside what follows" in capsys.readouterr().out
    )
    prompts._survey._thread.join(30)
    with pytest.raises(DataError, match="row 50: 'answer' must be"):
        next(iter(prompts))


def test_what_is_raised_meanwhile_ends_the_look(source):
    class Interrupted(Exception):
        pass

    def poll():
        raise Interrupted

    rows = [good(n, False) | {"answer": f"x_{n}"} for n in range(400)]
    prompts = source(rows, check="math")
    with pytest.raises(Interrupted):
        prompts.survey(poll)
    prompts._survey._thread.join(10)
    assert not prompts._survey._thread.is_alive()
