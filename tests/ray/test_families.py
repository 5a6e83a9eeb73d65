"""Weights of every supported family reach vLLM whole: in checkpoint names, fused, padded, repacked,
tied and untied."""

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

import pytest
import torch

from async_opd.core.weights import WeightLayout
from async_opd.maths.logprobs import ReadOptions, read_logprobs
from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.gloo import buckets
from async_opd.roles.weight_sync.sender import SENDERS
from tests.nccl_over_gloo import play

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes"),
]
SIZES = dict(
    vocab_size=120,
    num_attention_heads=2,
    num_key_value_heads=1,
    hidden_size=64,
    intermediate_size=96,
    head_dim=32,
    max_position_embeddings=128,
    eos_token_id=None,
    bos_token_id=None,
)
PROMPT = list(range(3, 23))
TOKENS, BUCKET = 16, 20_000
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)


def _there(call: str, *args):
    from tests.ray import engines

    return getattr(engines, call)(*args)


@pytest.fixture(scope="module")
def vllm():
    """Calls a function of `engines.py` in each of the first processes, with what `args` gives each;
    gives futures."""
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=spawn) as one,
        ProcessPoolExecutor(1, mp_context=spawn) as two,
    ):
        yield lambda call, args: [
            pool.submit(_there, call, *mine) for pool, mine in zip((one, two), args, strict=False)
        ]
        results([pool.submit(_there, "stop") for pool in (one, two)])


def results(futures: list[Future]) -> list:
    return [future.result() for future in futures]


def learner_logp(model, response: list[int]) -> torch.Tensor:
    ids_L = torch.tensor(PROMPT + response)
    with torch.no_grad():
        hidden_LD = causal_lm.hidden_states(model, ids_L, [len(ids_L)])[len(PROMPT) - 1 : -1]
        read = read_logprobs(
            hidden_LD, causal_lm.head(model), ids_L[len(PROMPT) :], ReadOptions(1.0, 5)
        )
    return read.sampled_N


def check(vllm, model, generators: int) -> list[int]:
    """Every generator's fresh sample has the learner's log-probs; returns one of the samples."""
    sampled = results(vllm("sample", [(PROMPT, TOKENS)] * generators))
    for ids, logp in sampled:
        torch.testing.assert_close(learner_logp(model, ids), torch.tensor(logp), atol=1e-4, rtol=0)
    return sampled[0][0]


@torch.no_grad()
def move(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))


def layout(described) -> WeightLayout:
    columns = zip(*((meta.name, meta.dtype, tuple(meta.shape)) for meta in described), strict=True)
    return WeightLayout(*columns)


def group(vllm, backend: str, generators: int, ranks: int = 1, timeout_s: float = 20.0):
    """A sender that has been joined by the generators, of so many `ranks` each."""
    sender, world = SENDERS[backend]("127.0.0.1", bucket_bytes=BUCKET, timeout_s=timeout_s), 1
    places = []
    for _ in range(generators):
        places.append((world, 1 + generators * ranks))
        world += ranks
    joined = vllm("join", [(sender.group(*place),) for place in places])
    sender.join(world)
    results(joined)
    return sender


def break_off(vllm, model, pieces, described, ranks: int = 1) -> None:
    """An update of which the first two thirds of the weights come, none of them the model's."""
    sender = group(vllm, "nccl", 1, ranks, timeout_s=3.0)
    weights = checkpoint_names.tensors(model, pieces, dict(model.named_parameters()))

    def some():
        for weight in islice(weights, len(described) * 2 // 3):
            yield torch.full_like(weight, torch.nan)
        raise RuntimeError("the learner breaks off")

    (updated,) = vllm("update", [(layout(described),)])
    with pytest.raises(RuntimeError, match="the learner breaks off"):
        sender.send(described, some())
    assert "it was aborted after 3 s" in f"{updated.exception()}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "settings", "generators", "backend"),
    [
        ("Qwen2", {}, 1, "gloo"),
        ("Qwen3", {}, 2, "gloo"),
        ("Llama", dict(attention_bias=True), 1, "gloo"),
        ("Gemma", {}, 1, "gloo"),
        ("Qwen3Moe", MOE, 2, "gloo"),
        ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), 1, "gloo"),
        ("Qwen3", {}, 1, "nccl"),
        ("Qwen3Moe", MOE, 1, "nccl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_after_each_update_generators_and_learner_agree(
    vllm, tiny_lm, tmp_path, monkeypatch, family, settings, generators, backend, tied
):
    """By nccl, which has gloo in NCCL's place, the second after one that broke off."""
    if backend == "nccl":
        play(monkeypatch.setattr)
    folder = str(tmp_path)
    tiny_lm(family, tie_word_embeddings=tied, **(SIZES | settings)).save_pretrained(folder)
    started = vllm("start", [(folder, backend)] * generators)
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    results(started)
    probe = check(vllm, model, generators)

    pieces = checkpoint_names.pieces(model)
    described = [meta for piece in pieces for meta in piece.tensors]
    assert len(list(buckets(described, BUCKET))) > 3
    sender = group(vllm, backend, generators)
    for version in (1, 2):
        if backend == "nccl" and version == 2:
            break_off(vllm, model, pieces, described)
            sender = group(vllm, backend, generators)
        before = learner_logp(model, probe)
        move(model, version)
        # far more than the tolerance
        assert (learner_logp(model, probe) - before).abs().max() > 0.05
        updated = vllm("update", [(layout(described),)] * generators)
        sender.send(
            described, checkpoint_names.tensors(model, pieces, dict(model.named_parameters()))
        )
        results(updated)
        check(vllm, model, generators)


def test_both_workers_of_an_engine_take_the_next_update_after_two_that_broke_off(
    vllm, tiny_lm, tmp_path, monkeypatch
):
    play(monkeypatch.setattr)
    folder = str(tmp_path)
    tiny_lm("Qwen3", **SIZES).save_pretrained(folder)
    started = vllm("start", [(folder, "nccl", 2)])
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    results(started)
    check(vllm, model, 1)
    pieces = checkpoint_names.pieces(model)
    described = [meta for piece in pieces for meta in piece.tensors]
    for _ in range(2):
        break_off(vllm, model, pieces, described, ranks=2)
    sender = group(vllm, "nccl", 1, ranks=2)
    move(model, 1)
    updated = vllm("update", [(layout(described),)])
    sender.send(described, checkpoint_names.tensors(model, pieces, dict(model.named_parameters())))
    results(updated)
    check(vllm, model, 1)
