import json
from random import Random

from math_verify import parse, verify

from async_opd.toy.task import (
    answer,
    dataset,
    draw,
    is_heldout,
    next_char,
    prompt,
    response,
    write_dataset,
)


def test_a_worked_response_is_literally_this():
    assert prompt((826, 957)) == "826+957="
    assert response((826, 957)) == "\n6+7+0=13\n2+5+1=08\n8+9+0=17\n\\boxed{1783}"
    assert response((57, 68)) == "\n7+8+0=15\n5+6+1=12\n\\boxed{125}"


def test_a_character_at_a_time_gives_the_worked_response():
    for problem in dataset(heldout=True)[:100]:
        written = ""
        while char := next_char(problem, written):
            written += char
        assert written == response(problem)


def test_what_belongs_after_a_slip_follows_what_is_written():
    slip = "\n7+8+0=25"  # 7+8 is 15: the carry becomes 2
    assert next_char((57, 68), slip) == "\n"
    assert next_char((57, 68), slip + "\n5+6+") == "2"
    assert next_char((57, 68), slip + "\n5+6+2=") == "1"
    assert next_char((57, 68), slip + "\n5+6+2=13\n\\boxed{") == "1"
    assert next_char((57, 68), slip + "\n5+6+2=13\n\\boxed{1") == "3"


def test_any_text_at_all_has_a_next_character():
    assert next_char((57, 68), "7") == "\n"
    assert next_char((57, 68), "\n7+8+0=15=") == "\n"
    assert next_char((57, 68), "\n\n\nx") == "b"
    assert next_char((57, 68), "\n\n\n\n") == ""


def test_the_boxed_answer_verifies():
    rng = Random(0)
    problems = [draw(rng) for _ in range(100)]
    assert all(verify(parse(answer(problem)), parse(response(problem))) for problem in problems)
    assert not verify(parse("1784"), parse(response((826, 957))))


def test_train_and_heldout_problems_are_disjoint():
    train, heldout = set(dataset(heldout=False)), set(dataset(heldout=True))
    assert (len(train), len(heldout)) == (20_480, 512)
    assert not any(is_heldout(problem) for problem in train)
    assert all(is_heldout((b, a)) for a, b in heldout)


def test_prompts_and_responses_keep_their_length_limits():
    problems = dataset(heldout=False)[:2000]
    assert max(len(prompt(problem)) for problem in problems) == 8
    assert max(len(response(problem)) + 1 for problem in problems) == 41


def test_the_dataset_is_the_same_every_time(tmp_path):
    write_dataset(tmp_path)
    heldout = (tmp_path / "heldout.jsonl").read_text().splitlines()
    train = (tmp_path / "train.jsonl").read_text().splitlines()
    assert (len(train), len(heldout)) == (20_480, 512)
    assert json.loads(heldout[0]) == {
        "id": "heldout-00000",
        "prompt": "136+99=",
        "answer": "235",
        "solution": "\n6+9+0=15\n3+9+1=13\n1+0+1=02\n\\boxed{235}",
    }
    assert json.loads(train[-1])["id"] == "train-20479"
