import json
from collections.abc import Callable
from itertools import islice

import datasets
import msgspec
import numpy as np
import pytest
from transformers import AutoTokenizer

from async_opd.core.errors import DataError
from async_opd.roles.rollout.config import DataConfig
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.roles.rollout.teacher_prompt import TeacherView
from async_opd.toy import STUDENT

ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "name": f"row-{n}"} for n in range(8)]
CHAT = (  # marks turns by characters that the toy alphabet has
    "{% for m in messages %}{{ m.role[0] }}={{ m.content }}\n{% endfor %}"
    "{% if enable_thinking %}{x}{% endif %}{{ hint or '' }}"
)
SPELLING = {char: index for index, char in enumerate("0123456789+=\n\\boxed{}", start=3)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def source(tmp_path) -> Callable[..., PromptSource]:
    """Prompts from a file of `rows`, read with the toy tokenizer; other keywords are data
    settings."""

    def make(rows=ROWS, *, kind="jsonl", seed=0, chat=None, views=None, **settings) -> PromptSource:
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(
                "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
            )
        tokenizer = AutoTokenizer.from_pretrained(STUDENT)
        tokenizer.chat_template = chat
        data = msgspec.convert(
            {"path": str(path), "chat_template": chat is not None} | settings, DataConfig
        )
        return PromptSource(data, tokenizer, seed=seed, views=views)

    return make


def spelt(text: str) -> list[int]:
    return [SPELLING.get(char, 2) for char in text]  # 2: not in the alphabet


def ids_of(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_becomes_a_prompt_of_the_toy_tokenizer_s_ids(source, kind):
    (prompt,) = source([{"prompt": "12+9=", "answer": 21}], kind=kind).first(1)
    assert (prompt.id, prompt.answer, prompt.teacher_ids, prompt.attempt) == ("0@0", "21", None, 0)
    # "0" is 3, so "1" is 4; "+" and "=" follow "9", which is 12
    assert prompt.ids.tolist() == [4, 5, 13, 12, 14]
    assert prompt.ids.dtype == "int32"


def test_columns_and_ids_are_those_the_config_names(source):
    rows = [{"question": "1+1=", "solution": 2.5, "key": "x"}]
    (prompt,) = source(rows, prompt="question", answer="solution", id="key").first(1)
    assert (prompt.id, prompt.answer) == ("x@0", "2.5")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_order_repeats_for_its_seed_and_differs_for_another(source, streaming):
    settings = dict(streaming=streaming, id="name")
    first, again, other = (ids_of(islice(source(seed=seed, **settings), 8)) for seed in (5, 5, 6))
    assert first == again != other
    assert sorted(first) == sorted(other) == [f"row-{n}@0" for n in range(8)]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_has_an_order_of_its_own(source, streaming):
    found = ids_of(islice(source(streaming=streaming, id="name"), 16))
    first, second = ([id.partition("@")[0] for id in found[at : at + 8]] for at in (0, 8))
    assert first != second and sorted(first) == sorted(second)
    assert len(set(found)) == 16  # the epoch is in the id


def test_first_keeps_the_order_of_the_file_and_reads_no_further(source):
    prompts = source(
        [*ROWS[:2], {"prompt": 7, "answer": "8", "name": "bad"}], kind="jsonl", id="name"
    )
    assert ids_of(prompts.first(2)) == ["row-0@0", "row-1@0"]


def test_first_refuses_to_measure_fewer_problems(source):
    with pytest.raises(DataError, match=r"data.path = .*rows.jsonl': 8 usable rows, problems = 9"):
        source().first(9)


@pytest.mark.parametrize("streaming", [False, True])
def test_used_up_epochs_are_an_error(source, streaming):
    prompts = iter(source(epochs=2, streaming=streaming))
    assert len(list(islice(prompts, 16))) == 16
    with pytest.raises(DataError, match=r"2 epochs are used up; raise data.epochs"):
        next(prompts)


def test_a_length_is_the_rows_of_one_epoch(source):
    assert len(source(epochs=3)) == 8
    with pytest.raises(TypeError):
        len(source(streaming=True))


def test_a_too_long_prompt_is_refused_by_its_id_when_it_is_read(source):
    rows = [ROWS[0], {"prompt": "100+100=", "answer": "200", "name": "long"}]
    prompts = source(rows, max_prompt_tokens=7, id="name")
    assert ids_of(prompts.first(1)) == ["row-0@0"]
    with pytest.raises(
        DataError, match=r'row long: 8 prompt tokens, data.max_prompt_tokens = 7;.* "skip"'
    ):
        prompts.first(2)


def test_a_too_long_prompt_can_be_skipped_and_is_counted(source):
    rows = [*ROWS, {"prompt": "100+100=", "answer": "200", "name": "long"}]
    prompts = source(rows, max_prompt_tokens=7, long_prompt="skip", id="name", epochs=2)
    reading = iter(prompts)
    found = ids_of(islice(reading, 16))
    assert len(set(found)) == 16 and "long@0" not in found
    with pytest.raises(DataError, match="used up"):
        next(reading)
    assert prompts.skipped == 2  # once an epoch


def test_a_set_of_which_every_prompt_is_skipped_is_an_error(source):
    with pytest.raises(DataError, match="no usable row"):
        next(iter(source(max_prompt_tokens=1, long_prompt="skip")))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["prompt", "answer", "id"])
def test_a_missing_column_lists_the_columns(source, key, streaming):
    with pytest.raises(
        DataError, match=rf"data.{key} = 'text': .*rows.jsonl has columns prompt, answer, name"
    ):
        source(streaming=streaming, **{key: "text"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": 7},
            r"row 0: 'prompt' must be a string or a list of messages, and not empty, got 7",
        ),
        ({"prompt": ""}, r"row 0: 'prompt' must be .*, got ''"),
        ({"prompt": None}, r"row 0: 'prompt' must be .*, got None"),
        ({"answer": None}, r"row 0: 'answer' must be a string or a number, got None"),
        ({"answer": ["2"]}, r"row 0: 'answer' must be a string or a number, got \['2'\]"),
        (
            {"prompt": [{"role": "user", "content": "1+1="}]},
            "row 0: 'prompt' holds messages: set data.chat",
        ),
    ],
)
def test_a_column_of_the_wrong_type_names_the_row(source, row, message):
    with pytest.raises(DataError, match=message):
        source([ROWS[0] | row]).first(1)


def test_ids_that_two_rows_share_are_refused(source):
    with pytest.raises(DataError, match=r"row row-3: its id 'name' is also that of row 3"):
        source([*ROWS, ROWS[3]], id="name").survey()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_go_through_the_chat_template(source, kind):
    messages = [{"role": "system", "content": "0"}, {"role": "user", "content": "1+1="}]
    (prompt,) = source([{"prompt": messages, "answer": "2"}], kind=kind, chat=CHAT).first(1)
    assert prompt.ids.tolist() == spelt("s=0\nu=1+1=\n")


def test_a_plain_prompt_is_the_user_s_message(source):
    assert source(ROWS, chat=CHAT).first(1)[0].ids.tolist() == spelt("u=0+1=\n")


def test_template_args_reach_the_template(source):
    (prompt,) = source(chat=CHAT, template_args={"enable_thinking": True}).first(1)
    assert prompt.ids.tolist() == spelt("u=0+1=\n{x}")


def test_the_teacher_may_have_a_rendering_of_its_own(source):
    views = {"": TeacherView(template_args={"enable_thinking": True, "hint": "9"})}
    (prompt,) = source(chat=CHAT, views=views).first(1)
    assert prompt.ids.tolist() == spelt("u=0+1=\n")
    assert prompt.teacher_ids.tolist() == spelt("u=0+1=\n{x}9")


def test_the_teacher_s_rendering_is_held_to_the_same_length(source):
    views = {"": TeacherView(template_args={"hint": "9" * 20})}
    prompts = source(chat=CHAT, views=views, max_prompt_tokens=16)
    # 7 + 20
    with pytest.raises(DataError, match=r"row 0: 27 prompt tokens, data.max_prompt_tokens = 16"):
        prompts.first(1)


CONTEXT = TeacherView(context="{solution}={prompt}={solution}")


def solved(prompt, solution) -> list[dict]:
    return [{"prompt": prompt, "answer": "2", "why": solution}]


def test_a_context_takes_in_prompt_and_solution(source):
    (prompt,) = source(solved("1+1=", 7), solution="why", views={"": CONTEXT}).first(1)
    assert prompt.ids.tolist() == spelt("1+1=")
    assert prompt.teacher_ids.tolist() == spelt("7=1+1==7")


def test_braces_of_prompt_and_solution_are_left_as_they_are(source):
    rows = solved("{solution}{}", r"\boxed{{prompt}}")
    (prompt,) = source(rows, solution="why", views={"": CONTEXT}).first(1)
    assert prompt.teacher_ids.tolist() == spelt(r"\boxed{{prompt}}={solution}{}=\boxed{{prompt}}")


def test_with_a_chat_template_the_context_takes_the_place_of_the_last_user_message(source):
    said = [("system", "0"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows, view = (
        solved(messages, "9"),
        TeacherView(context="{prompt}+{solution}", template_args={"hint": "5"}),
    )
    (prompt,) = source(rows, chat=CHAT, solution="why", views={"": view}).first(1)
    assert prompt.ids.tolist() == spelt("s=0\nu=1\na=2\nu=3\na=4\n")
    assert prompt.teacher_ids.tolist() == spelt("s=0\nu=1\na=2\nu=3+9\na=4\n5")


def test_with_a_chat_template_a_plain_prompt_is_the_message_of_the_context(source):
    (prompt,) = source(solved("1+1=", "2"), chat=CHAT, solution="why", views={"": CONTEXT}).first(1)
    assert prompt.teacher_ids.tolist() == spelt("u=2=1+1==2\n")


@pytest.mark.parametrize("solution", [None, "", ["1"]])
def test_a_solution_of_the_wrong_type_names_the_row(source, solution):
    with pytest.raises(
        DataError, match=r"row 0: 'why' must be a string that is not empty or a number, got "
    ):
        source(solved("1+1=", solution), solution="why", views={"": CONTEXT}).first(1)


def test_messages_without_a_text_of_the_user_s_name_the_row(source):
    rows = solved([{"role": "system", "content": "1"}], "2")
    with pytest.raises(
        DataError, match=r"row 0: no text of the user's that a teacher's context could take in"
    ):
        source(rows, chat=CHAT, solution="why", views={"": CONTEXT}).first(1)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_of_solutions_lists_the_columns(source, streaming):
    with pytest.raises(
        DataError, match=r"data.solution = 'how': .*rows.jsonl has columns prompt, answer, name"
    ):
        source(solution="how", streaming=streaming, views={"": CONTEXT})


def test_a_teacher_s_own_bound_holds_for_its_rendering_alone(source):
    view = TeacherView(context="{prompt}{solution}", longest=("teacher.max_prompt_tokens", 24))
    settings = dict(solution="why", views={"": view}, max_prompt_tokens=4)
    (prompt,) = source(solved("1+1=", "9" * 20), **settings).first(1)
    assert len(prompt.teacher_ids) == 24
    with pytest.raises(
        DataError, match=r"row 0: 25 prompt tokens, teacher.max_prompt_tokens = 24; shorten it"
    ):
        source(solved("1+1=", "9" * 21), **settings).first(1)
    skipping = source(
        [*solved("1+1=", "9" * 21), *solved("2+1=", "3")], long_prompt="skip", **settings
    )
    assert ids_of(skipping.first(1)) == ["1@0"] and skipping.skipped == 1


MATH_AND_CODE = {"math": TeacherView(), "code": CONTEXT}
KINDS = [
    {"prompt": "1+1=", "answer": "2", "kind": kind, "why": why}
    for kind, why in (("math", None), ("code", "3"))
]


def test_a_row_names_its_teacher_and_is_shown_to_it_as_that_one_wants(source):
    math, code = source(KINDS, teacher="kind", solution="why", views=MATH_AND_CODE).first(2)
    assert (math.teacher, math.teacher_ids) == ("math", None)
    assert (code.teacher, code.teacher_ids.tolist()) == ("code", spelt("3=1+1==3"))


@pytest.mark.parametrize("bad", ["maths", None, 3])
def test_a_row_of_no_known_teacher_is_refused_before_anything_is_read(source, bad):
    rows = [
        {**KINDS[0], "kind": bad if isinstance(bad, int) else "math", "name": f"row-{n}"}
        for n in range(3)
    ]
    rows[2]["kind"] = bad
    named = "s row-0, row-1, row-2" if isinstance(bad, int) else " row-2"
    expected = rf"row{named}: data.teacher, column 'kind' = {bad!r}: must be 'math' or 'code'"
    with pytest.raises(DataError, match=expected):
        source(rows, id="name", teacher="kind", views=MATH_AND_CODE).survey()


def test_a_streamed_row_of_no_known_teacher_is_refused_when_it_is_read(source):
    prompts = source(
        [KINDS[0], KINDS[0] | {"kind": "maths"}],
        streaming=True,
        teacher="kind",
        views=MATH_AND_CODE,
    )
    assert ids_of(prompts.first(1)) == ["0@0"]
    with pytest.raises(
        DataError,
        match=r"row 1: data.teacher, column 'kind' = 'maths': .*; did you mean 'math'\?",
    ):
        prompts.first(2)


@pytest.mark.parametrize(
    ("chat", "prompt", "message"),
    [
        (CHAT, [{"role": "user"}], "row 0: 'prompt', message 1: must have role and content, got "),
        (CHAT, ["1+1="], "row 0: 'prompt', message 1: must have role and content, got "),
        (
            "{{ raise_exception('no system') }}",
            "1+1=",
            "row 0: the chat template refuses 'prompt': TemplateError: no system",
        ),
    ],
)
def test_what_a_template_cannot_render_names_the_row(source, chat, prompt, message):
    with pytest.raises(DataError, match=message):
        source([{"prompt": prompt, "answer": "2"}], chat=chat).first(1)


def test_a_tokenizer_without_a_template_is_refused_at_once(source):
    with pytest.raises(
        DataError, match=r"data.chat_template = true: the tokenizer of student.model has no"
    ):
        source(chat="")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (['{"prompt": '], {}, "JSON parse error"),
        ([], {}, "no rows"),
        (ROWS, {"split": "trian"}, "trian"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(source, rows, settings, message, streaming):
    with pytest.raises(DataError, match=rf"data.path = .*rows.jsonl', split '\w+': .*{message}"):
        source(rows, streaming=streaming, **settings).first(1)


@pytest.mark.parametrize("streaming", [True, False])
def test_reading_prints_nothing_and_leaves_datasets_as_talkative_as_it_was(
    source, streaming, capfd
):
    def talkative() -> tuple:
        return datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()

    datasets.enable_progress_bars()  # as they are by themselves
    datasets.logging.set_verbosity_warning()
    before = talkative()
    next(iter(source(streaming=streaming)))
    with pytest.raises(DataError):
        source(['{"prompt": '], streaming=streaming).first(1)
    assert talkative() == before
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_breaks_in_the_middle_says_why(source, tmp_path):
    prompts = iter(source(streaming=True, shuffle_buffer=1))
    next(prompts)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows.jsonl"):
        list(islice(prompts, 16))


LONG = [{"prompt": "100+100=", "answer": "200", "name": f"long-{n}"} for n in range(3)]
SKIPPING = dict(max_prompt_tokens=7, long_prompt="skip")
ALIKE = ("id", "ids", "answer", "teacher_ids", "attempt", "teacher")


def told(prompts) -> list[list]:
    return [[str(getattr(prompt, field)) for field in ALIKE] for prompt in prompts]


@pytest.mark.parametrize("settings", [{}, {"id": "name"}, {"shuffle_buffer": 3}])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_continuation_is_what_an_unbroken_reading_gives(source, streaming, settings):
    view = TeacherView(context="{solution}={prompt}", longest=("teacher.max_prompt_tokens", 64))
    rows = dict(rows=[*ROWS[:4], *LONG, *ROWS[4:]], solution="name", seed=3, views={"": view})
    settings = dict(streaming=streaming, **rows, **SKIPPING, **settings)
    # 3 epochs of 8 usable rows and 3 skipped ones, and 2 more
    unbroken = told(islice(source(**settings), 26))
    # before the first row, in an epoch, behind its last usable row, in the third
    for stop in (0, 5, 8, 18):
        first = source(**settings)
        handed_out = list(islice(first, stop))
        position = json.loads(json.dumps(first.position))
        outstanding = ids_of(handed_out)[::-2]  # of every epoch so far, in an order of their own
        after = source(**settings)
        found = told(islice(after.continued(position, outstanding), len(outstanding) + 26 - stop))
        assert found == told(handed_out[::-2]) + unbroken[stop:]
        whole = source(**settings)
        assert told(islice(whole, 26)) == unbroken and whole.position == after.position


def test_a_position_counts_the_rows_that_were_read_and_those_skipped(source):
    prompts = source([*LONG, *ROWS], seed=1, **SKIPPING)
    start = {"epoch": 0, "drawn": 0, "skipped": 0, "left_out": 0, "rows": 11}
    content = prompts.position["content"]
    assert prompts.position == start | {"content": content}
    reading = iter(prompts)
    (*_, last) = islice(reading, 8)
    order = np.random.default_rng(1).permutation(11).tolist()
    drawn = order.index(int(last.id.removesuffix("@0"))) + 1
    assert prompts.position == {
        "epoch": 0,
        "drawn": drawn,
        "skipped": drawn - 8,
        "left_out": 0,
        "rows": 11,
        "content": content,
    }
    next(reading)
    assert prompts.position["epoch"] == 1


def test_what_is_handed_out_again_leaves_the_position_alone(source):
    first = source()
    handed_out = ids_of(islice(first, 5))
    after = source()
    again = after.continued(first.position, handed_out[2:])
    assert ids_of(islice(again, 2)) == handed_out[2:4] and after.position == first.position


def test_one_source_can_go_back_to_a_position_of_its_own(source):
    prompts = source()
    start, found = prompts.position, ids_of(islice(prompts, 11))
    assert ids_of(islice(prompts.continued(start, []), 11)) == found


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "gone"), [({"id": "name"}, "row-8@0"), ({}, "8@0"), ({}, "row-1@0")]
)
def test_an_outstanding_row_that_is_gone_is_named(source, streaming, settings, gone):
    prompts = source(streaming=streaming, **settings)
    known = next(iter(prompts)).id
    with pytest.raises(
        DataError, match=rf"row {gone}: handed out before, but is not there now: .*rows.jsonl has"
    ):
        prompts.continued(prompts.position, [known, gone])


def test_an_outstanding_row_that_became_too_long_is_named(source):
    prompts = source(LONG + ROWS, id="name", **SKIPPING)
    with pytest.raises(DataError, match="row long-1@0: handed out before, but cannot be used now"):
        prompts.continued(prompts.position, ["row-1@0", "long-1@0"])


@pytest.mark.parametrize("settings", [{}, {"id": "name"}, {"streaming": True, "shuffle_buffer": 3}])
@pytest.mark.parametrize("surveyed", [False, True])
def test_a_set_with_another_content_cannot_be_continued(source, settings, surveyed):
    first = source(**settings)
    list(islice(first, len(ROWS)))
    position = json.loads(json.dumps(first.position))
    for change in ({"answer": "another"}, {"prompt": "another?"}):
        after = source([*ROWS[:2], ROWS[2] | change, *ROWS[3:]], **settings)
        if surveyed:
            after.survey()
        with pytest.raises(DataError, match=r"rows.jsonl': its rows are not those that the run"):
            after.continued(position, [])
    again = source([row | {"more": n} for n, row in enumerate(ROWS)], **settings)
    again.continued(position, [])  # a column that is not read is no change


def test_a_set_of_another_length_cannot_be_continued(source):
    position = source().position
    with pytest.raises(DataError, match=r"rows.jsonl': 7 rows, it had 8 before"):
        source(ROWS[:7]).continued(position, [])
