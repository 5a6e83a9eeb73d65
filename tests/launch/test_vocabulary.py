"""Tokenizers of several families, whose ids the models of a run have, share, or lack."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from async_opd.config.load import load
from async_opd.core.errors import DataError
from async_opd.core.vocabulary import listed, runs
from async_opd.core.wire import Needs
from async_opd.launch.inputs import read, read_problems
from async_opd.launch.toy_models import resolve_toy
from async_opd.launch.vocabulary import read_tokens
from async_opd.objectives.g_opd import GOpd
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.teacher.config import ReferenceConfig
from async_opd.toy import STUDENT

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(holes: int = 0) -> Tokenizer:
    """Byte-level BPE whose merges stand behind a hole of ids that no token has."""
    vocab = {byte: id for id, byte in enumerate(ALPHABET)}
    vocab["12"] = len(vocab) + holes
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({c: id for id, c in enumerate("?0123456789+=")}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece makes them: a space is ▁, and one is put before the text."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "0123456789+=Us:\n"), ("▁12", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


FAMILIES = {"byte-level": byte_level, "holes": lambda: byte_level(9), "words": word_level}
FAMILIES |= {"unigram": unigram}
EVERY = pytest.mark.parametrize("family", FAMILIES)
# an added token would fill the hole
DENSE = pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"holes"}))


def made(folder: Path, family: str, *, added=("<end>",), head: int | None = None, **values) -> str:
    """The files of a model of such a tokenizer with `added` tokens, of which the first ends."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=FAMILIES[family]())
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    tokenizer.eos_token = added[0]
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    config = json.loads((STUDENT / "config.json").read_text())
    most = max(tokenizer.get_vocab().values()) + 1
    config |= {"vocab_size": head or most, "eos_token_id": None} | values
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    weights = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    del weights["lm_head.weight"]  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def config(tmp_path, student: str, teacher: str, *settings: str):
    models = f"student.model={student}", f"teacher.model={teacher}"
    usual = f"run.dir={tmp_path}/run", "objective.k=5"
    demo = load("configs/demo.toml", [*usual, *models, *settings])
    return resolve_toy(demo, tmp_path)


def tokens(tmp_path, student: str, teacher: str, *settings: str):
    return read_tokens(
        config(tmp_path, student, teacher, *settings), AutoTokenizer.from_pretrained(student)
    )


def edited(folder, file: str, **changes) -> str:
    """A copy of the shipped student with `changes` made to one of its JSON files."""
    shutil.copytree(STUDENT, folder)
    edit(folder / file, **changes)
    return str(folder)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@EVERY
def test_a_teacher_that_knows_the_student_s_tokens_and_more_is_accepted(tmp_path, family):
    student = made(tmp_path / "student", family)
    teacher = made(tmp_path / "teacher", family, added=("<end>", "<tool>", "<call>"))
    both = tokens(tmp_path, student, teacher)
    known = AutoTokenizer.from_pretrained(student).get_vocab()
    assert sorted(known.values()) == listed(both.student).tolist()
    all_of_them = AutoTokenizer.from_pretrained(teacher).get_vocab()
    assert sorted(all_of_them.values()) == listed(both.whole["teacher"]).tolist()
    assert len(all_of_them) == len(known) + 2
    assert both.eos_ids == (known["<end>"],)
    with pytest.raises(DataError, match=r"student's on \d+ tokens|logits for \d+ tokens"):
        tokens(tmp_path, teacher, student)  # it can write what that one does not know


@EVERY
def test_ids_of_a_head_that_no_token_has_are_not_the_student_s(tmp_path, family):
    known = AutoTokenizer.from_pretrained(made(tmp_path / "exact", family)).get_vocab()
    padded = made(tmp_path / "padded", family, head=max(known.values()) + 100)
    both = tokens(tmp_path, padded, padded)
    assert both.student == both.whole["teacher"] == runs(known.values())
    assert len(both.student) == (3 if family == "holes" else 1)


def test_a_teacher_whose_tokens_mean_something_else_is_refused(tmp_path):
    shutil.copytree(STUDENT, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["7"] = vocabulary["7"], vocabulary["3"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="disagrees with the student's on 2 tokens, such as '3'"):
        tokens(tmp_path, str(STUDENT), str(tmp_path / "other"))


@EVERY
def test_an_added_token_of_another_id_is_refused(tmp_path, family):
    student = made(tmp_path / "student", family, added=("<end>", "<a>", "<b>"))
    teacher = made(tmp_path / "teacher", family, added=("<end>", "<b>", "<a>"))
    with pytest.raises(DataError, match=r"on 2 tokens, such as '<a>' \(student \d+, teacher \d+\)"):
        tokens(tmp_path, student, teacher)


def test_a_scorer_with_fewer_logits_than_the_student_has_tokens_is_refused(tmp_path, monkeypatch):
    small = edited(tmp_path / "small", "config.json", vocab_size=20)
    with pytest.raises(DataError, match=r"teacher.model = '.*/small': 20 logits for 24 tokens"):
        tokens(tmp_path, str(STUDENT), small)
    monkeypatch.setattr(TopkKl, "needs", lambda self: Needs(reference=True))
    with pytest.raises(DataError, match=r"reference.model = '.*/small': 20 logits for 24 tokens"):
        tokens(tmp_path, str(STUDENT), "toy:teacher", f"reference.model={small}")


def test_more_candidates_than_tokens_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"objective\.k = 25: the vocabulary has 24"):
        tokens(tmp_path, str(STUDENT), "toy:teacher", "objective.k=25")


@DENSE
def test_tokens_that_the_head_has_no_rows_for_are_named_once_and_refused_when_met(
    tmp_path, family, capfd
):
    known = AutoTokenizer.from_pretrained(made(tmp_path / "exact", family)).get_vocab()
    small = made(tmp_path / "small", family, added=("<end>", "<pad>"), head=max(known.values()) + 1)
    both = tokens(tmp_path, small, small)
    assert sorted(known.values()) == listed(both.student).tolist()
    out = capfd.readouterr()
    lines = [line for line in (out.out + out.err).splitlines() if "<pad>" in line]
    assert len(lines) == 2 and "student.model" in lines[0] and "teacher.model" in lines[1]

    rows = tmp_path / "rows.jsonl"
    texts = {"a": "1+1=", "b": "1+1<pad>="}
    lines = [json.dumps({"id": id, "prompt": text, "answer": "2"}) for id, text in texts.items()]
    rows.write_text("\n".join(lines))
    paths = f"data.path={rows}", f"eval.path={rows}", "eval.problems=1", "data.streaming=true"
    run = config(tmp_path, small, small, *paths)
    met = r"row b: holds '<pad>' \(\d+\); the student's head has \d+ rows"
    with pytest.raises(DataError, match=met):
        list(islice(read(run).prompts, 2))
    with pytest.raises(DataError, match=met):
        read_problems(run, None)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% if false %}<pad>{% endif %}{% endfor %}"


@DENSE
def test_a_head_without_a_row_for_what_prompts_are_written_with_is_refused(tmp_path, family):
    known = AutoTokenizer.from_pretrained(made(tmp_path / "exact", family)).get_vocab()
    head = max(known.values()) + 1
    small = made(tmp_path / "small", family, added=("<end>", "<pad>"), head=head)
    (tmp_path / "small" / "chat_template.jinja").write_text(TEMPLATE)
    tokens(tmp_path, small, small)
    with pytest.raises(DataError, match=r"its chat template writes '<pad>' \(\d+\), for which its"):
        tokens(tmp_path, small, small, "data.chat_template=true")
    edit(tmp_path / "small" / "tokenizer_config.json", bos_token="<pad>")
    (tmp_path / "small" / "chat_template.jinja").write_text("{{ bos_token }}")
    with pytest.raises(DataError, match=r"its chat template writes '<pad>' \(\d+\), for which its"):
        tokens(tmp_path, small, small, "data.chat_template=true")

    exact = made(tmp_path / "student", family)  # of a teacher that reads by it alone
    edit(tmp_path / "small" / "tokenizer_config.json", bos_token=None)
    (tmp_path / "small" / "chat_template.jinja").write_text(TEMPLATE)
    tokens(tmp_path, exact, small)
    with pytest.raises(DataError, match=r"^teacher.model = .*its chat template writes '<pad>' \("):
        tokens(tmp_path, exact, small, "teacher.chat_template=true")

    first = made(tmp_path / "first", family, added=("<end>", "<s>"), head=head)
    file = tmp_path / "first" / "tokenizer.json"
    tree = json.loads(file.read_text())
    place = {"id": "<s>", "type_id": 0}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": place}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [head], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"its tokenizer writes '<s>' \(\d+\), for which its head"):
        tokens(tmp_path, first, first)


def test_end_ids_come_from_generation_config_config_and_tokenizer_in_that_order(tmp_path):
    def ends(folder: str):
        both = tokens(tmp_path, folder, folder)
        return both.eos_ids, both.ends["student"]["file"]

    assert ends(edited(tmp_path / "a", "generation_config.json", eos_token_id=[1, 5])) == (
        (1, 5),
        "generation_config.json",
    )
    named = edited(tmp_path / "b", "generation_config.json", eos_token_id=None)
    assert ends(named) == ((1,), "config.json")
    Path(named, "generation_config.json").unlink()
    assert ends(named) == ((1,), "config.json")
    by_tokenizer = made(tmp_path / "c", "words")
    assert ends(by_tokenizer) == ((13,), "tokenizer_config.json")


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "eval"])
@pytest.mark.parametrize(
    ("eos", "why"),
    [
        ("1", "must be an id or a list of ids"),
        ([], "must be an id or a list of ids"),
        (True, "must be an id or a list of ids"),
        ([1, "5"], "must be an id or a list of ids"),
        ({"a": 1}, "must be an id or a list of ids"),
        (99, "99 is none of the 24 ids that its tokenizer and its head have"),
        ([1, -1], "-1 is none of the 24 ids"),
    ],
)
def test_end_ids_that_are_none_are_refused_by_file_and_key(tmp_path, key, eos, why):
    wrong = edited(tmp_path / "wrong", "generation_config.json", eos_token_id=eos)
    message = rf".*: generation_config.json: eos_token_id = .*: {why}"
    if key == "eval":
        with pytest.raises(DataError, match=f"student.model = {message}"):
            read_problems(config(tmp_path, wrong, "toy:teacher"), 1)
    else:
        models = (wrong, "toy:teacher") if key == "student.model" else ("toy:student", wrong)
        with pytest.raises(DataError, match=f"{key} = {message}"):
            read(config(tmp_path, *models))


@pytest.mark.parametrize("eos", ["1", [], [1, 77]])
def test_wrong_end_ids_of_the_config_are_refused_by_its_file(tmp_path, eos):
    wrong = edited(tmp_path / "wrong", "generation_config.json", eos_token_id=None)
    path = Path(wrong, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
    with pytest.raises(DataError, match=r"student.model = '.*': .*eos_token_id"):
        read(config(tmp_path, wrong, "toy:teacher"))


def test_a_generation_config_that_is_none_is_refused(tmp_path):
    wrong = edited(tmp_path / "wrong", "generation_config.json")
    for text in ("[1]", "{"):
        Path(wrong, "generation_config.json").write_text(text)
        with pytest.raises(DataError, match=r"student.model = '.*': its generation_config.json: "):
            tokens(tmp_path, wrong, "toy:teacher")


def test_a_model_without_any_end_is_refused(tmp_path):
    endless = edited(tmp_path / "endless", "generation_config.json", eos_token_id=None)
    for file, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        path = Path(endless, file)
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    with pytest.raises(DataError, match=r"no eos_token_id in any of generation_config.json, con"):
        tokens(tmp_path, endless, endless)


ENDS = ("<end>", "<stop>")


@pytest.fixture
def differing(tmp_path):
    """A student that ends by <end>, and a teacher of the same tokens that ends by <stop>."""
    student = made(tmp_path / "student", "words", added=ENDS)
    return student, made(tmp_path / "teacher", "words", added=ENDS, eos_token_id=14)


def test_a_teacher_s_end_at_which_the_student_does_not_stop_is_refused(tmp_path, differing):
    with pytest.raises(
        DataError,
        match=r"teacher.model = '.*': ends by '<stop>' \(14\), where the student does not stop: it"
        r" ends by '<end>' \(13\); add \['<stop>'\] to rollout.stop or map them in teacher.ends_as",
    ):
        tokens(tmp_path, *differing)


@pytest.mark.parametrize("stop", ['["<stop>"]', "[14]"])
def test_a_stop_lets_such_a_run_go_on_and_the_reverse_is_a_line(tmp_path, differing, stop, capfd):
    both = tokens(tmp_path, *differing, f"rollout.stop={stop}")
    assert both.eos_ids == (13, 14) and both.stops == (14,)
    out = capfd.readouterr()
    said = [line for line in (out.out + out.err).splitlines() if "does not end" in line]
    assert len(said) == 1
    assert "does not end by '<end>' (13), as the student does; it ends by '<stop>' (14)" in said[0]
    assert both.ends["teacher"] == {
        "ids": [14],
        "tokens": ["<stop>"],
        "file": "config.json",
    }


def test_a_teacher_s_end_may_be_read_as_the_student_s(tmp_path, differing):
    both = tokens(tmp_path, *differing, 'teacher.ends_as={"<stop>" = "<end>"}')
    assert both.ends_as == {"teacher": ((14, 13),)}
    assert both.eos_ids == (13,) and listed(both.student).tolist() == list(range(14))
    assert listed(both.whole["teacher"]).tolist() == list(range(15))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (['teacher.ends_as={"<no>" = "<end>"}'], r"'<no>' must be an end of teacher.model"),
        (['teacher.ends_as={"1" = "<end>"}'], r"'1' must be an end of teacher.model"),
        (['teacher.ends_as={"<stop>" = "1"}'], r"'1' must be an end of the student's"),
        (['teacher.ends_as={"<stop>" = "<end>"}', "rollout.stop=[14]"], "has no effect"),
    ],
)
def test_a_wrong_map_of_ends_is_refused(tmp_path, differing, settings, why):
    with pytest.raises(DataError, match=rf"teacher.ends_as = .*: {why}"):
        tokens(tmp_path, *differing, *settings)


def test_an_end_that_the_student_has_no_token_for_can_only_be_mapped(tmp_path):
    student = made(tmp_path / "student", "words")
    teacher = made(tmp_path / "teacher", "words", added=ENDS, eos_token_id=[14, 13])
    with pytest.raises(DataError, match=r"ends by '<end>' \(13\); map them in teacher.ends_as"):
        tokens(tmp_path, student, teacher)
    both = tokens(tmp_path, student, teacher, 'teacher.ends_as={"<stop>" = "<end>"}')
    assert listed(both.student).tolist() == list(range(14))


def test_an_end_of_the_reference_s_that_the_student_has_no_token_for_is_refused(tmp_path):
    student = made(tmp_path / "student", "words")
    other = made(tmp_path / "other", "words", added=ENDS, eos_token_id=14)
    asked = config(tmp_path, student, student)
    asked = replace(asked, objective=GOpd(), reference=ReferenceConfig(model=other))
    with pytest.raises(
        DataError, match=r"reference.model = .* '<end>' \(13\); the student has no such token$"
    ):
        read_tokens(asked, AutoTokenizer.from_pretrained(student))


@pytest.mark.parametrize(
    ("family", "stop", "resolved"),
    [
        ("words", '["="]', (12, "=")),
        ("words", '["=1"]', ("=1",)),
        ("words", '[3, "2", "<end>"]', (3, "2", 13)),
        ("byte-level", '["\\n"]', (ALPHABET.index("Ċ"), "\n")),
        ("byte-level", '["»"]', ("»",)),  # which is the name of a byte, too
        ("byte-level", '["12"]', (256, "12")),
        ("holes", '["12", "13"]', (265, "12", "13")),
        ("unigram", '["\\nUs:", "+"]', ("\nUs:", 12, "+")),
    ],
)
def test_an_added_token_as_a_stop_is_its_id_and_any_other_text_is_one_however_it_is_spelled(
    tmp_path, family, stop, resolved
):
    """12 ends a response as the token 12, and as a part of any other."""
    student = made(tmp_path / "student", family)
    assert tokens(tmp_path, student, student, f"rollout.stop={stop}").stops == resolved


@pytest.mark.parametrize("stop", ["[99]", '["hello"]', "[24]", '["é"]', '["    "]', '["1é"]'])
def test_a_stop_that_the_student_cannot_write_is_refused(tmp_path, stop):
    with pytest.raises(DataError, match=r"rollout.stop = ('hello'|99|24|'1?é'|'    '): "):
        tokens(tmp_path, str(STUDENT), "toy:teacher", f"rollout.stop={stop}")
