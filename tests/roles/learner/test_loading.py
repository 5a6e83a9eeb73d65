"""Two real ranks over gloo load a student that they share out by ZeRO-3."""

import pytest
import torch

from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.toy.tokenizer import build_tokenizer
from tests.roles.learner import loading_process
from tests.roles.learner.forked import run_ranks

pytestmark = pytest.mark.ray
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


@pytest.fixture
def load(tiny_lm, tmp_path):
    """Starts two ranks; what each got, and where the model is. `change` is given its weights before
    they are saved."""

    def load(family: str, change=lambda weights: None, **settings):
        model, lm = tmp_path / "model", tiny_lm(family, **settings)
        weights = lm.state_dict()
        change(weights)
        lm.save_pretrained(model, state_dict=weights, max_shard_size="50KB")
        build_tokenizer().save_pretrained(model)
        outs = [str(tmp_path / f"{rank}") for rank in range(2)]
        job = dict(meeting=str(tmp_path / "meeting"), model=str(model))
        run_ranks(loading_process, [job | dict(rank=rank, out=outs[rank]) for rank in range(2)])
        return [torch.load(out) for out in outs], model

    return load


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3", dict(tie_word_embeddings=True)),
        ("Qwen2", dict(tie_word_embeddings=False)),
        ("Qwen3Moe", dict(tie_word_embeddings=False, **EXPERTS)),
    ],
)
def test_each_rank_holds_its_part_of_the_weights_and_never_a_whole_copy(load, family, settings):
    ranks, model = load(family, **settings)
    whole = causal_lm.read("it", model, "float32")
    expected = dict(whole.named_parameters(remove_duplicate=False))
    nbytes = sum(weight.nbytes for weight in whole.parameters())
    largest = max(weight.nbytes for weight in whole.parameters())
    for rank in ranks:
        assert rank["weights"].keys() == expected.keys()
        for name, weight in rank["weights"].items():
            assert torch.equal(weight, expected[name]), name
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(rank["buffers"][name], buffer)
        assert not any(rank["held"].values())
        assert rank["in_files"] and not any(rank["in_files"])
        pieces = checkpoint_names.pieces(whole)
        assert rank["sent"] == [(m.name, m.shape) for piece in pieces for m in piece.tensors]
        assert rank["most"] <= 0.6 * nbytes + largest, (rank["most"], nbytes, largest)


def lacking(weights: dict) -> None:
    for name in [name for name in weights if "_proj" in name]:
        del weights[name]


def of_another_shape(weights: dict) -> None:
    for name in [name for name in weights if "_proj" in name]:
        weights[name] = weights[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking, "its files lack 14 weights, such as model.layers.0.mlp.down_proj.weight"),
        (of_another_shape, "14 weights have another shape than its config says, such as"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_every_rank(load, change, says):
    """They have no order in which ranks could share them out."""
    errors, _ = load("Qwen3", change)
    assert len(errors) == 2 and all(says in error for error in errors)
