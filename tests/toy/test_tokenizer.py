import pytest
from transformers import AutoTokenizer

from async_opd.toy import STUDENT, TEACHER
from async_opd.toy.task import response
from async_opd.toy.tokenizer import build_tokenizer


@pytest.mark.parametrize("folder", [None, TEACHER, STUDENT])
def test_decoding_gives_back_the_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder else build_tokenizer()
    text = response((826, 957))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) == 40
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == text


def test_the_vocabulary_is_three_specials_and_the_alphabet():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 24
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
