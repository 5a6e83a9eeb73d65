"""Two real ranks over gloo load a student that they share out by ZeRO-3."""

import multiprocessing

import pytest
import torch

from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.toy.tokenizer import build_tokenizer
from tests.roles.learner import loading_process

pytestmark = pytest.mark.ray
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


@pytest.fixture
def load(tiny_lm, tmp_path):
    """Starts two ranks; what each got, and the model as it is loaded whole."""
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([loading_process.__name__])

    def load(family: str, **settings):
        model = tmp_path / "model"
        tiny_lm(family, **settings).save_pretrained(model, max_shard_size="50KB")
        build_tokenizer().save_pretrained(model)
        outs = [str(tmp_path / f"{rank}") for rank in range(2)]
        args = str(tmp_path / "meeting"), str(model)
        processes = [
            forked.Process(target=loading_process.main, args=(rank, *args, outs[rank]))
            for rank in range(2)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(100)
            assert [process.exitcode for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
        return [torch.load(out) for out in outs], causal_lm.read("it", model, "float32")

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
    ranks, whole = load(family, **settings)
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
        pieces = checkpoint_names.pieces(whole)
        assert rank["sent"] == [(m.name, m.shape) for piece in pieces for m in piece.tensors]
        assert rank["most"] <= 0.6 * nbytes + largest, (rank["most"], nbytes, largest)
