import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from async_opd.core.wire import RecordedTrajectory
from async_opd.telemetry.rollout_log import decoder, sample_file


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
    return RecordedTrajectory(
        **fields | dict(truncated=False, correct=None, numbers=numbers) | more
    )


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
        "prompt_cut": 3,
        "tokens": ["<1>", "<2>", "<3>"],
        "cut": 6,
        "truncated": False,
        "correct": None,
        "student": [-1.0, -0.66667, -0.33333],
    }
    assert (second["tokens"], second["cut"], second["student"]) == (["<4>"], 8, [-1.0])


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
