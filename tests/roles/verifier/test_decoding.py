"""Which special tokens a check sees."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from async_opd.roles.verifier.checks.math import check
from async_opd.roles.verifier.decoding import decoding


def tokenizer(*special: str) -> Tokenizer:
    """A tokenizer of bytes with special tokens."""
    alphabet = {letter: id for id, letter in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return made


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
    ],
)
def test_marks_of_thoughts_that_are_special_tokens_reach_a_check(opening, closing):
    made = tokenizer(opening, closing, "<|end|>")
    thought = rf"{opening}It is \boxed{{42}}, é.{closing}"
    decode = decoding(made, special_tokens=False)
    for said, right in ((r" No, \boxed{41}", False), ("", False), (r" So \boxed{42}", True)):
        ids = np.array(made.encode(f"{thought}{said}<|end|>").ids, np.int32)
        assert decode(ids) == f"{thought}{said}"
        assert check(decode(ids), "42")[0] is right


def test_what_is_thought_in_a_channel_is_no_answer():
    made = tokenizer("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    thought = r"<|channel|>analysis<|message|>\boxed{42}<|end|>"
    said = r"<|start|>assistant<|channel|>final<|message|>\boxed{41}<|end|>"
    text = decoding(made, special_tokens=False)(np.array(made.encode(thought + said).ids))
    assert "<|end|>" not in text
    assert (check(text, "41")[0], check(text, "42")[0]) == (True, False)


def test_a_check_that_asks_has_all_special_tokens():
    made = tokenizer("<think>", "<|end|>")
    ids = np.array(made.encode("<think>a<|end|>").ids, np.int32)
    assert decoding(made, special_tokens=True)(ids) == "<think>a<|end|>"
    assert decoding(made, special_tokens=False)(ids) == "<think>a"
    assert decoding(made, special_tokens=False)(np.array([], np.int32)) == ""
