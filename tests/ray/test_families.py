"""Weights of every supported family reach vLLM whole: in checkpoint names, fused, padded, repacked,
tied and untied."""

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

from async_opd.maths.logprobs import ReadOptions, read_logprobs
from async_opd.roles.models import causal_lm
from async_opd.roles.weight_sync import checkpoint_names
from async_opd.roles.weight_sync.gloo import buckets
from async_opd.roles.weight_sync.sender import GlooSender

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
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


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "settings", "generators"),
    [
        ("Qwen2", {}, 1),
        ("Qwen3", {}, 2),
        ("Llama", dict(attention_bias=True), 1),
        ("Gemma", {}, 1),
        ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48), 2),
        ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_after_each_update_generators_and_learner_agree(
    vllm, tiny_lm, tmp_path, family, settings, generators, tied
):
    folder = str(tmp_path)
    tiny_lm(family, tie_word_embeddings=tied, **(SIZES | settings)).save_pretrained(folder)
    started = vllm("start", [(folder,)] * generators)
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    results(started)
    probe = check(vllm, model, generators)

    pieces = checkpoint_names.pieces(model)
    described = [meta for piece in pieces for meta in piece.tensors]
    columns = zip(*((meta.name, meta.dtype, list(meta.shape)) for meta in described), strict=True)
    update_info = dict(zip(("names", "dtype_names", "shapes"), columns, strict=True))
    sender = GlooSender("127.0.0.1", bucket_bytes=BUCKET, timeout_s=20.0)
    assert len(list(buckets(described, BUCKET))) > 3
    joined = vllm("join", [(sender.init_info(1 + at, 1 + generators),) for at in range(generators)])
    sender.join(1 + generators)
    results(joined)
    for version in (1, 2):
        before = learner_logp(model, probe)
        move(model, version)
        # far more than the tolerance
        assert (learner_logp(model, probe) - before).abs().max() > 0.05
        updated = vllm("update", [(update_info,)] * generators)
        sender.send(
            described, checkpoint_names.tensors(model, pieces, dict(model.named_parameters()))
        )
        results(updated)
        check(vllm, model, generators)
