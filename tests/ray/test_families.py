"""Weights of every supported family reach vLLM whole: in checkpoint names, fused, padded, repacked, tied and untied."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from async_opd import causal_lm
from async_opd.collective import buckets
from async_opd.learner import export
from async_opd.learner.publish import GlooSender
from async_opd.maths.logprobs import read_logprobs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
SIZES = dict(
    vocab_size=120, hidden_size=64, intermediate_size=96, head_dim=32, max_position_embeddings=128,
    eos_token_id=None, bos_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2)
PROMPT = list(range(3, 23))
TOKENS = 16


def _there(call: str, *args):
    from tests.ray import engines  # loads vLLM

    return getattr(engines, call)(*args)


@pytest.fixture(scope="module")
def vllm():
    """Calls a function of `engines.py` in a process of its own; gives a future."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda call, *args: pool.submit(_there, call, *args)


def learner_logp(model, response: list[int]) -> torch.Tensor:
    ids_L = torch.tensor(PROMPT + response)
    with torch.no_grad():
        hidden_LD = causal_lm.hidden_states(model, ids_L, [len(ids_L)])[len(PROMPT) - 1 : -1]
        read = read_logprobs(hidden_LD, causal_lm.head(model), ids_L[len(PROMPT) :], temperature=1.0, chunk_rows=5)
    return read.sampled_N


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "settings", "generators"),
    [
        ("Qwen2", {}, 1),
        ("Qwen3", {}, 2),
        ("Llama", dict(attention_bias=True), 1),
        ("Gemma", {}, 1),
        ("Qwen3Moe", EXPERTS, 2),
        ("Mixtral", MIXTRAL, 1),
    ],
)
def test_every_generator_samples_from_the_moved_weights(
    vllm, tiny_lm, tmp_path, family, settings, generators, tied
):  # fmt: skip
    folder = str(tmp_path)
    tiny_lm(family, tie_word_embeddings=tied, **(SIZES | settings)).save_pretrained(folder)
    started = vllm("start", folder, generators)
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    started.result()
    for ids, logp in vllm("sample", PROMPT, TOKENS).result():
        torch.testing.assert_close(learner_logp(model, ids), torch.tensor(logp), atol=1e-4, rtol=0)
    probe, before = ids, learner_logp(model, ids)

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    pieces = export.pieces(model)
    sender = GlooSender("127.0.0.1", bucket_bytes=20_000, timeout_s=20.0)
    described = [meta for piece in pieces for meta in piece.tensors]
    assert len(list(buckets(described, 20_000))) > 3
    infos = [sender.init_info(1 + at, 1 + generators) for at in range(generators)]
    joined = vllm("join", infos)
    sender.join(1 + generators)
    joined.result()
    columns = [(meta.name, meta.dtype, list(meta.shape)) for meta in described]
    updated = vllm("update", dict(zip(("names", "dtype_names", "shapes"), zip(*columns, strict=True), strict=True)))
    sender.send(described, export.tensors(model, pieces, dict(model.named_parameters())))
    updated.result()

    sampled = vllm("sample", PROMPT, TOKENS).result()
    assert len(sampled) == generators
    for ids, logp in sampled:
        torch.testing.assert_close(learner_logp(model, ids), torch.tensor(logp), atol=1e-4, rtol=0)
    assert (learner_logp(model, probe) - before).abs().max() > 0.05  # far more than the tolerance
