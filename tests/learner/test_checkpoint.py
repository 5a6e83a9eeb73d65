import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd import causal_lm
from async_opd.learner import checkpoint
from async_opd.toy.tokenizer import build_tokenizer


@pytest.fixture
def source(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


STATE = {"version": 7, "running": {"reward": {"count": 3.0, "mean": 0.5, "squares": 0.25}}}


def save(model, source, folder):
    checkpoint.save(model, dict(model.named_parameters()), source, STATE, folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_with_equal_weights_and_its_tokenizer(tiny_lm, source, tmp_path, tied):
    model = tiny_lm(tie_word_embeddings=tied, attn_implementation=causal_lm.ATTENTION)
    save(model, source, tmp_path / "deep" / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "out").get_vocab() == build_tokenizer().get_vocab()
    assert json.loads((tmp_path / "deep" / "out" / checkpoint.STATE).read_text()) == STATE
    assert causal_lm.ATTENTION not in json.dumps(loaded.config.to_dict())


def test_a_checkpoint_replaces_an_older_one_whole(tiny_lm, source, tmp_path):
    save(tiny_lm(seed=0), source, tmp_path / "out")
    (tmp_path / "out" / "left_over").touch()
    save(tiny_lm(seed=1), source, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tiny_lm(seed=1).lm_head.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert not (tmp_path / "out" / "left_over").exists()


def test_a_save_that_fails_leaves_the_older_checkpoint(tiny_lm, source, tmp_path):
    save(tiny_lm(seed=0), source, tmp_path / "out")
    with pytest.raises(OSError):
        save(tiny_lm(seed=1), str(tmp_path / "nothing here"), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tiny_lm(seed=0).lm_head.weight)


def test_what_an_interrupted_save_left_behind_is_no_hindrance(tiny_lm, source, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    save(tiny_lm(), source, tmp_path / "out")
    assert not (tmp_path / "out" / "half").exists() and not (tmp_path / ".out.partial").exists()
