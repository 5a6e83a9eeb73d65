import json
import re
import resource

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_opd.core.errors import CheckpointError
from async_opd.core.lora import LoraConfig
from async_opd.maths.advantages import Moments
from async_opd.roles.learner import checkpoint
from async_opd.roles.learner.checkpoint import RankState, load_rank, save_rank
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.models import causal_lm
from async_opd.toy.tokenizer import build_tokenizer


@pytest.fixture
def source(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


def save(model, source, folder):
    checkpoint.save(model, dict(model.named_parameters()), checkpoint.read_source(source), folder)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_with_equal_weights_and_its_tokenizer(tiny_lm, source, tmp_path, tied):
    model = tiny_lm(tie_word_embeddings=tied, attn_implementation=causal_lm.ATTENTION)
    save(model, source, tmp_path / "deep" / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "deep" / "out").get_vocab()
        == build_tokenizer().get_vocab()
    )
    assert causal_lm.ATTENTION not in json.dumps(loaded.config.to_dict())


def test_a_checkpoint_replaces_an_older_one_whole(tiny_lm, source, tmp_path):
    save(tiny_lm(seed=0), source, tmp_path / "out")
    (tmp_path / "out" / "left_over").touch()
    save(tiny_lm(seed=1), source, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tiny_lm(seed=1).lm_head.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert not (tmp_path / "out" / "left_over").exists()


def test_a_save_that_finds_no_room_is_named_and_leaves_the_older_checkpoint(
    tiny_lm, source, tmp_path
):
    save(tiny_lm(seed=0), source, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*File too large"):
            save(tiny_lm(seed=1), source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tiny_lm(seed=0).lm_head.weight)


def test_what_an_interrupted_save_left_behind_is_no_hindrance(tiny_lm, source, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").touch()
    save(tiny_lm(), source, tmp_path / "out")
    assert not (tmp_path / "out" / "half").exists() and not (tmp_path / ".out.partial").exists()


def rank_state(random: bytes) -> RankState:
    running = {"reward": Moments(3.0, 0.5, 0.25)}
    return RankState(
        ranks=2, zero_stage=3, dtype="bfloat16", version=7, running=running, random={"cpu": random}
    )


def test_the_state_of_a_rank_comes_back_as_it_was(tmp_path):
    config = LearnerConfig(
        trajectories_per_step=8, lr=1e-3, ranks=2, zero_stage=3, dtype="bfloat16"
    )
    for rank, random in enumerate((b"\x00\xff", b"one")):
        save_rank(rank_state(random), tmp_path, rank)
    assert [load_rank(tmp_path, rank, config) for rank in (0, 1)] == [
        rank_state(b"\x00\xff"),
        rank_state(b"one"),
    ]


@pytest.mark.parametrize(
    ("name", "then", "now"),
    [("ranks", 2, 4), ("zero_stage", 3, 2), ("dtype", "'bfloat16'", "'float32'")],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_another_number_of_ranks_stage_or_dtype_is_refused_on_every_rank(
    tmp_path, name, then, now, rank
):
    (tmp_path / "learner").mkdir()
    save_rank(rank_state(b""), tmp_path / "learner", 0)
    settings = dict(ranks=2, zero_stage=3, dtype="bfloat16") | {
        name: now if isinstance(now, int) else "float32"
    }
    config = LearnerConfig(trajectories_per_step=8, lr=1e-3, **settings)
    message = (
        f"checkpoint {tmp_path}: was saved with learner.{name} = {then} and cannot go on with {now}"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_rank(tmp_path / "learner", rank, config)


LORA = LoraConfig(rank=8)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (None, LORA, "student.lora = None and cannot go on with {'rank': 8, 'alpha': 8.0, "),
        (LORA, None, "'target_modules': 'all-linear'} and cannot go on with None"),
        (LORA, LoraConfig(rank=8, alpha=4.0), "cannot go on with {'rank': 8, 'alpha': 4.0, "),
    ],
)
def test_a_state_goes_on_with_its_adapter_alone(tmp_path, then, now, words):
    config = LearnerConfig(
        trajectories_per_step=8, lr=1e-3, ranks=2, zero_stage=3, dtype="bfloat16"
    )
    (tmp_path / "learner").mkdir()
    state = msgspec.structs.replace(rank_state(b""), lora=then, base_sum=then and 5)
    for rank in (0, 1):
        save_rank(state, tmp_path / "learner", rank)
    with pytest.raises(CheckpointError) as raised:
        load_rank(tmp_path / "learner", 1, config, now, now and 5)
    assert words in f"{raised.value}"
    if then:  # an alpha that is written out is what it is where it is absent
        load_rank(tmp_path / "learner", 1, config, LoraConfig(rank=8, alpha=8.0), 5)
        with pytest.raises(CheckpointError, match=r"student\.model holds other weights now than"):
            load_rank(tmp_path / "learner", 1, config, LORA, 6)


def test_a_rank_that_does_not_see_the_files_says_so(tmp_path):
    config = LearnerConfig(trajectories_per_step=8, lr=1e-3)
    with pytest.raises(
        CheckpointError,
        match=r"rank-0.json: No such file or directory; every learner rank must see",
    ):
        load_rank(tmp_path, 0, config)
