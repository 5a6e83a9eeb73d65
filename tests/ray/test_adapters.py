"""A student's adapter reaches vLLM, alone or merged: log-probs are the learner's, the base stays as
it is, and what breaks off leaves the adapter before."""

import asyncio
from itertools import islice
from typing import get_args

import numpy as np
import pytest
import torch

from async_opd.core.errors import DataError
from async_opd.core.lora import ENGINE_RANKS, LoraConfig
from async_opd.core.weights import WeightLayout
from async_opd.core.wire import Sampling
from async_opd.driver.replica_pool import ReplicaPool
from async_opd.driver.weight_publisher import WeightPublisher
from async_opd.launch.models import check_adapter_alone
from async_opd.roles.learner import lora
from async_opd.roles.learner.weights import AdapterAlone, StudentWeights
from async_opd.roles.models import causal_lm
from async_opd.tools.plan.adapter import adapter
from async_opd.tools.plan.shape import read
from tests.nccl_over_gloo import play
from tests.ray.conftest import demo_config, running
from tests.ray.test_families import BUCKET, MOE, SIZES, check, group, learner_logp, results, vllm
from tests.ray.test_weights import FAST, produced
from tests.simulated.runs import replica

__all__ = ["vllm"]
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes"),
]


class Whole:
    """A gather where nothing is sharded."""

    def __init__(self, parameters):
        assert parameters

    def __enter__(self): ...
    def __exit__(self, *_): ...


@torch.no_grad()
def move(model, seed: int) -> None:
    """As an optimizer moves an adapter, and further."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def sent(vllm, sender, weights, generators: int = 1) -> None:
    layout: WeightLayout = weights.layout()
    updated = vllm("update", [(layout,)] * generators)
    sender.send(weights.described, weights.tensors())
    results(updated)


def break_off(vllm, weights, backend: str, ranks: int = 1) -> None:
    """An update of which half of the tensors come, none of them the student's."""
    sender = group(vllm, backend, 1, ranks, timeout_s=3.0)

    def some():
        for weight in islice(weights.tensors(), len(weights.described) // 2):
            yield torch.full_like(weight, torch.nan)
        raise RuntimeError("the learner breaks off")

    (updated,) = vllm("update", [(weights.layout(),)])
    with pytest.raises(RuntimeError, match="the learner breaks off"):
        sender.send(weights.described, some())
    sender.leave()
    assert updated.exception()


@pytest.mark.parametrize(
    ("family", "settings", "modules", "way", "backend"),
    [
        ("Qwen2", {}, "all-linear", "adapter", "gloo"),
        ("Qwen3", dict(tie_word_embeddings=True), "all-linear", "adapter", "nccl"),
        ("Qwen3", {}, ("q_proj", "v_proj", "down_proj"), "adapter", "gloo"),
        ("Llama", dict(attention_bias=True), "all-linear", "adapter", "gloo"),
        ("Gemma", {}, "all-linear", "adapter", "gloo"),
        ("Qwen2", {}, ("q_proj", "up_proj"), "merged", "gloo"),
        ("Qwen3", dict(tie_word_embeddings=True), "all-linear", "merged", "nccl"),
        ("Qwen3Moe", MOE, "all-linear", "merged", "gloo"),
        ("GPT2", {}, "all-linear", "merged", "gloo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_after_each_update_generators_and_learner_agree(
    vllm, tiny_lm, tmp_path, monkeypatch, family, settings, modules, way, backend
):
    if backend == "nccl":
        play(monkeypatch.setattr)
    folder = str(tmp_path)
    tiny_lm(family, **(SIZES | settings)).save_pretrained(folder)
    config = LoraConfig(rank=5, alpha=8, target_modules=modules)
    alone = way == "adapter"
    started = vllm("start", [(folder, backend, 1, config if alone else None)])
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    lora.wrap(model, config, 0)
    results(started)
    if alone:
        sizes = adapter(config, read(model.config.to_dict(), "student.model"))
        assert results(vllm("places", [()])) == [4 * sizes.places(1)]
    probe = check(vllm, model, 1)
    weights = (AdapterAlone if alone else StudentWeights)(model, BUCKET, Whole)
    sender = group(vllm, backend, 1)
    for version in (1, 2):
        if alone and version == 2:
            break_off(vllm, weights, backend)
            check(vllm, model, 1)  # under the adapter before
            sender = group(vllm, backend, 1)
        before = learner_logp(model, probe)
        move(model, version)
        assert (learner_logp(model, probe) - before).abs().max() > 0.05
        sent(vllm, sender, weights)
        check(vllm, model, 1)


@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("GPT2", "c_attn, c_fc, c_proj"),
        ("GPTNeoX", "dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
        # vLLM knows one of several there, which the checkpoint has as one
        ("Glm4", "down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj"),
    ],
)
def test_where_vllm_has_no_place_for_an_adapter_it_does_not_travel_alone(
    tiny_lm, tmp_path, family, layers
):
    lm = tiny_lm(family, **(SIZES | dict(pad_token_id=0)))
    lm.save_pretrained(tmp_path)
    with pytest.raises(DataError) as refused:
        check_adapter_alone("student.model", str(tmp_path), False, LoraConfig(rank=4))
    assert f"{refused.value}" == (
        f"sync.lora = 'adapter': student.model = '{tmp_path}' is a {type(lm).__name__}, in"
        f" which vLLM has no place for an adapter of {layers}; must be 'merged'"
    )


@pytest.mark.filterwarnings("ignore::Warning")  # those of importing vLLM
def test_beside_layers_that_vllm_knows_by_the_same_names_it_does(tiny_lm, tmp_path):
    for family, modules in [("Glm4", ("q_proj", "down_proj")), ("Phi3", ("gate_up_proj",))]:
        tiny_lm(family, **(SIZES | dict(pad_token_id=0))).save_pretrained(tmp_path)
        adapter = LoraConfig(rank=4, target_modules=modules)
        check_adapter_alone("student.model", str(tmp_path), False, adapter)


def test_vllm_knows_the_ranks_that_we_count_with():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ENGINE_RANKS


def test_both_workers_of_an_engine_slice_the_adapter_for_themselves(vllm, tiny_lm, tmp_path):
    folder = str(tmp_path)
    tiny_lm("Qwen3", **SIZES).save_pretrained(folder)
    config = LoraConfig(rank=4)
    started = vllm("start", [(folder, "gloo", 2, config)])
    model = causal_lm.load(folder, "float32", torch.device("cpu"))
    lora.wrap(model, config, 0)
    results(started)
    weights = AdapterAlone(model, BUCKET, Whole)
    break_off(vllm, weights, "gloo", ranks=2)
    sender = group(vllm, "gloo", 1, ranks=2)
    for version in (1, 2):
        move(model, version)
        sent(vllm, sender, weights)
        check(vllm, model, 1)
        results(vllm("refuse_next_adapter", [()]))
        (updated,) = vllm("update", [(weights.layout(),)])
        sender.send(weights.described, map(torch.ones_like, weights.tensors()))
        assert "no room" in f"{updated.exception()}"
        check(vllm, model, 1)  # neither worker has what the other refused


@pytest.mark.parametrize("way", ["merged", "adapter"])
async def test_five_updates_of_a_run_agree_with_the_learner_and_a_newcomer_has_all(tmp_path, way):
    """Over two ranks under ZeRO-3, with a request in flight, an evaluation, and a generator that
    joins behind all of them."""
    config = demo_config(
        tmp_path,
        *FAST,
        "learner.lr=2e-2",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "student.lora.rank=8",
        "student.lora.alpha=16",
        f"sync.lora={way}",
        "sync.timeout_s=20",
        "rollout.max_new_tokens=200",
    )
    async with running(config, eos_ids=()) as (roles, publisher, prompts):
        (generator,) = roles.generators
        starting = asyncio.ensure_future(roles.spawn("generator", 1))
        probe_ids, probe = await generator.probe()
        before = await roles.learner.logprobs(probe_ids, probe.ids)
        data = await produced(roles, prompts, 4)
        for version in range(1, 6):
            long = asyncio.ensure_future(generator.generate(next(prompts)))
            assert (await roles.learner.step(data)).version == version
            assert (await publisher.publish(version, admit=lambda: None)).largest <= 1e-4
            meta, ref = await long
        group, spans = await ref, meta.spans[0]
        assert spans[-1].version == 5
        logp = await roles.learner.logprobs(group.prompt.ids, group.rollouts[0].ids)
        gap = np.abs(logp - group.rollouts[0].behaviour_logp)
        assert gap[spans[-1].start :].max() <= 1e-4
        after = await roles.learner.logprobs(probe_ids, probe.ids)
        assert np.abs(after - before).max() > 0.05  # by far more than the gap
        _, ref = await generator.respond(next(prompts), Sampling())
        (rollout,), prompt = (await ref).rollouts, (await ref).prompt
        logp = await roles.learner.logprobs(prompt.ids, rollout.ids)
        assert np.abs(logp - rollout.behaviour_logp).max() <= 1e-4
        newcomer = await starting
        grown = WeightPublisher(
            replica(roles.learner),
            ReplicaPool("generator", [generator, newcomer]),
            parity_every=1,
            tolerance=1e-4,
        )
        assert (await grown.publish(5, admit=lambda: None)).largest <= 1e-4
        layout = await roles.learner.weight_layout()
        assert layout.nbytes == publisher.carried == grown.carried
        assert layout.adapter is (way == "adapter")
