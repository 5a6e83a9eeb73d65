import json
import shutil

import pytest
from transformers import AutoTokenizer

from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.core.wire import Needs
from async_opd.launch.inputs import check_epochs, read, views
from async_opd.launch.models import eos_ids
from async_opd.launch.toy_models import resolve_toy
from async_opd.launch.vocabulary import check_ends, check_scorers
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.rollout.prompts import PromptSource
from async_opd.toy import STUDENT


def demo(tmp_path, *overrides: str):
    return resolve_toy(load("configs/demo.toml", [f"run.dir={tmp_path}/run", *overrides]), tmp_path)


def edited(folder, file: str, **changes) -> str:
    """A copy of the shipped student with `changes` made to one of its JSON files."""
    shutil.copytree(STUDENT, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def test_a_teacher_whose_tokens_mean_something_else_is_refused(tmp_path):
    shutil.copytree(STUDENT, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["7"] = vocabulary["7"], vocabulary["3"]
    file.write_text(json.dumps(tokenizer))
    config = demo(tmp_path, f"teacher.model={tmp_path}/other")
    with pytest.raises(DataError, match="disagrees with the student's on 2 tokens, such as '3'"):
        check_scorers(config, AutoTokenizer.from_pretrained(STUDENT))


def test_a_teacher_with_a_padded_vocabulary_is_accepted_and_a_smaller_one_is_not(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    padded = edited(tmp_path / "padded", "config.json", vocab_size=32)
    check_scorers(demo(tmp_path, f"teacher.model={padded}"), tokenizer)
    small = edited(tmp_path / "small", "config.json", vocab_size=20)
    with pytest.raises(DataError, match="20 logits for 24 tokens"):
        check_scorers(demo(tmp_path, f"teacher.model={small}"), tokenizer)


def test_a_reference_whose_tokens_mean_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(reference=True))
    small = edited(tmp_path / "small", "config.json", vocab_size=20)
    with pytest.raises(DataError, match=r"reference.model = '.*/small': 20 logits for 24 tokens"):
        check_scorers(
            demo(tmp_path, f"reference.model={small}"), AutoTokenizer.from_pretrained(STUDENT)
        )


ROW = '{"id": "a", "prompt": "1+1=", "answer": "2", "why": "99999"}\n'
PRIVILEGED = ("teacher.context={prompt}{solution}", "data.solution=why", "data.max_prompt_tokens=4")


@pytest.mark.parametrize("settings", [(), ("teacher.max_prompt_tokens=9",)])
def test_a_teacher_s_own_bound_holds_in_place_of_the_student_s(tmp_path, settings):
    (tmp_path / "rows.jsonl").write_text(ROW)
    config = demo(tmp_path, f"data.path={tmp_path}/rows.jsonl", *PRIVILEGED, *settings)
    source = PromptSource(
        config.data, AutoTokenizer.from_pretrained(STUDENT), seed=0, views=views(config)
    )
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


def test_more_candidates_than_tokens_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"objective\.k = 25: the vocabulary has 24"):
        check_scorers(demo(tmp_path, "objective.k=25"), AutoTokenizer.from_pretrained(STUDENT))


def test_end_ids_come_from_the_generation_config(tmp_path):
    assert eos_ids("student.model", str(STUDENT), False) == [1]
    several = edited(tmp_path / "several", "generation_config.json", eos_token_id=[1, 5])
    assert eos_ids("student.model", str(several), False) == [1, 5]


def test_a_teacher_that_answers_must_end_as_the_student_does(tmp_path):
    sampling = [
        f"teacher_sampling.{key}" for key in ("share=0.5", "full_until_step=1", "until_step=2")
    ]
    check_ends(demo(tmp_path, *sampling))
    other = edited(tmp_path / "other", "generation_config.json", eos_token_id=[1, 5])
    with pytest.raises(DataError, match=r"answers end by tokens \[1, 5\], the student's by \[1\]"):
        check_ends(demo(tmp_path, f"teacher.model={other}", *sampling))


def test_too_few_rows_for_the_steps_are_refused_before_anything_starts(tmp_path):
    config = demo(tmp_path, "data.epochs=1", "run.steps=300")
    source = PromptSource(config.data, AutoTokenizer.from_pretrained(STUDENT), seed=0)
    with pytest.raises(
        DataError, match=r"data\.epochs = 1: 1 x 20480 rows, but run.steps = 300 needs 28800"
    ):
        check_epochs(config, source)
