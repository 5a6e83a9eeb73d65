import pytest
from transformers import AutoTokenizer

from async_opd.toy import STUDENT, TEACHER
from async_opd.toy.task import response
from async_opd.toy.tokenizer import build_tokenizer


@pytest.mark.parametrize("load", [build_tokenizer, *(lambda f=f: AutoTokenizer.from_pretrained(f) for f in (TEACHER, STUDENT))])
def test_decoding_gives_back_the_text(load):
    tokenizer, text = load(), response((4826, 957))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) == 50
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == text
