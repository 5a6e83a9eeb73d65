import pytest
from transformers import AutoTokenizer

from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.launch.inputs import check_epochs, read
from async_opd.launch.readings import views
from async_opd.launch.toy_models import resolve_toy
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.toy import STUDENT


def demo(tmp_path, *overrides: str):
    return resolve_toy(load("configs/demo.toml", [f"run.dir={tmp_path}/run", *overrides]), tmp_path)


ROW = '{"id": "a", "prompt": "1+1=", "answer": "2", "why": "99999"}\n'
PRIVILEGED = ("teacher.context={prompt}{solution}", "data.solution=why", "data.max_prompt_tokens=4")


@pytest.mark.parametrize("settings", [(), ("teacher.max_prompt_tokens=9",)])
def test_a_teacher_s_own_bound_holds_in_place_of_the_student_s(tmp_path, settings):
    (tmp_path / "rows.jsonl").write_text(ROW)
    config = demo(tmp_path, f"data.path={tmp_path}/rows.jsonl", *PRIVILEGED, *settings)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    source = PromptSource(config.data, tokenizer, seed=0, views=views(config, tokenizer))
    if settings:
        assert len(source.first(1)[0].teacher_ids) == 9
    else:
        with pytest.raises(DataError, match=r"9 prompt tokens, data.max_prompt_tokens = 4"):
            source.first(1)


def test_problems_to_measure_need_no_columns_for_teachers_that_are_not_measured(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    paths = (f"data.path={tmp_path}/rows.jsonl", "teacher.max_prompt_tokens=9", "eval.problems=3")
    config = demo(tmp_path, *paths, *PRIVILEGED[:2], "teacher.evaluate=false")
    inputs = read(config)
    assert [prompt.teacher_ids for prompt in inputs.held_out] == [None] * 3
    assert len(next(iter(inputs.prompts)).teacher_ids) == 9
    with pytest.raises(DataError, match=r"data.solution = 'why': .*heldout.jsonl has columns"):
        read(demo(tmp_path, *paths, *PRIVILEGED[:2]))


def test_too_few_rows_for_the_steps_are_refused_before_anything_starts(tmp_path):
    config = demo(tmp_path, "data.epochs=1", "run.steps=300")
    source = PromptSource(config.data, AutoTokenizer.from_pretrained(STUDENT), seed=0)
    with pytest.raises(
        DataError, match=r"data\.epochs = 1: 1 x 20480 rows, but run.steps = 300 needs 28800"
    ):
        check_epochs(config, source)
