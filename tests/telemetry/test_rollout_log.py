import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from async_opd.core.recorded import RecordedTrajectory
from async_opd.telemetry.rollout_log import TOKENS, decoder, sample_file


def recorded(ids: list[int], **more) -> RecordedTrajectory:
    prompt = np.array([7, 8], np.int32)
    fields = dict(
        id="3@0#1",
        step=20,
        prompt_ids=prompt,
        ids=np.array(ids, np.int32),
        prompt_tokens=5,
        tokens=9,
    )
    numbers = {"student": np.linspace(-1, -1 / 3, len(ids), dtype=np.float32)}
    return RecordedTrajectory(**fields | dict(truncated=False, reward=None, numbers=numbers) | more)


def test_each_trajectory_is_a_line_with_its_tokens_and_what_was_left_out(tmp_path):
    write = sample_file(tmp_path / "samples.jsonl", lambda ids: [f"<{id}>" for id in ids])
    write((recorded([1, 2, 3]), recorded([4])))
    write(())
    first, second = (
        json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()
    )
    assert first == {
        "step": 20,
        "id": "3@0#1",
        "prompt": "<7><8>",
        "prompt_tokens": 5,
        "prompt_cut": 3,
        "tokens": ["<1>", "<2>", "<3>"],
        "cut": 6,
        "truncated": False,
        "kept_kv": False,
        "reward": None,
        "student": [-1, -0.667, -0.333],
    }
    assert (second["tokens"], second["cut"], second["student"]) == (["<4>"], 8, -1)


def test_a_prompt_is_told_as_its_teacher_read_it_by_the_teachers_own_tokens(tmp_path):
    readers = {name: lambda ids, name=name: [f"<{name}{id}>" for id in ids] for name in ("", "b")}
    theirs = {"b": readers["b"]}
    write = sample_file(tmp_path / "samples.jsonl", readers[""], theirs=theirs)
    shown = np.array([9], np.int32)
    write(tuple(recorded([1], teacher=name, teacher_prompt_ids=shown) for name in ("a", "b")))
    lines = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    told = [(line["prompt"], line["teacher_prompt"], line["tokens"]) for line in lines]
    assert told == [("<7><8>", "<9>", ["<1>"]), ("<7><8>", "<b9>", ["<1>"])]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5, 0.5], 0.5),
        ([0.0, 0.0], 0),
        ([1.0, 0.0], [1, 0]),
        ([12.0, 12.0], 12),
        ([-4.2137, -0.0523, -1e-7], [-4.21, -0.052, 0]),
        ([2.3456e-5, 1.2e-8], [2.35e-5, 1e-8]),
        ([123456.0, 1.4], [123000, 0]),
        ([123455.0, 123456.0], [123455, 123456]),  # versions, say
        ([np.nan, -np.inf, -1.5], [None, None, -1.5]),
        ([np.nan, np.nan], None),
        ([], []),
    ],
)
def test_numbers_have_three_digits_and_those_all_alike_are_one(tmp_path, values, shown):
    write = sample_file(tmp_path / "samples.jsonl", lambda ids: ["a"] * len(ids))
    numbers = {"student": np.array(values, np.float32)}
    write((recorded(list(range(len(values))), numbers=numbers),))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["student"] == shown


def test_a_long_response_has_all_its_tokens_and_the_numbers_of_those_that_a_report_shows(tmp_path):
    write = sample_file(tmp_path / "samples.jsonl", lambda ids: ["token"] * len(ids))
    rng = np.random.default_rng(0)
    numbers = {f"column {n}": rng.normal(size=2000).astype(np.float32) for n in range(13)}
    write((recorded(list(range(2000)), numbers=numbers),))
    line = json.loads((tmp_path / "samples.jsonl").read_text())
    assert (len(line["tokens"]), len(line["column 0"]), TOKENS) == (2000, 500, 500)
    assert (tmp_path / "samples.jsonl").stat().st_size < 64 * 2**10


def test_the_file_becomes_the_earlier_one_where_it_is_full_and_the_last_are_kept(tmp_path):
    write = sample_file(tmp_path / "samples.jsonl", lambda ids: ["a"] * len(ids), 1000)
    for step in range(1, 101):
        write((recorded([1, 2, 3], step=step),))
    files = [tmp_path / name for name in ("samples.earlier.jsonl", "samples.jsonl")]
    steps = [json.loads(line)["step"] for file in files for line in file.read_text().splitlines()]
    assert steps == list(range(steps[0], 101)) and len(steps) > 5
    assert sum(file.stat().st_size for file in files) < 3000
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_character_of_several_tokens_stands_with_the_last_and_the_pieces_are_the_text():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    pieces = decoder(tokenizer)(np.array(tokenizer.encode("a é\n").ids, np.int32))
    assert pieces == ["a", " ", "", "é", "\n"]
