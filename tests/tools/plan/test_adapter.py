"""Sizes of an adapter against what peft makes and what is sent, and what a plan makes of them."""

import pytest

from async_opd.config.load import load
from async_opd.config.sections import SyncConfig
from async_opd.core.lora import LoraConfig
from async_opd.core.wire import Needs
from async_opd.roles.learner import lora
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.learner.weights import AdapterAlone, StudentWeights
from async_opd.roles.rollout.config import RolloutConfig
from async_opd.tools.plan import memory
from async_opd.tools.plan.adapter import adapter
from async_opd.tools.plan.make import GIB, Cluster
from async_opd.tools.plan.passes import Packed
from async_opd.tools.plan.plan import plan
from async_opd.tools.plan.report import lines
from async_opd.tools.plan.shape import _shipped, read
from tests.roles.learner.test_weights import Gather
from tests.tools.plan.test_command import ONE_NODE

QWEN3 = read(_shipped()["Qwen/Qwen3-8B"], "student.model")
LORA = LoraConfig(rank=16)
BATCH = Packed(tokens=4096, places=4096)


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "down_proj"), ("o_proj", "up_proj")])
@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Gemma", "Qwen3Moe"])
def test_the_sizes_are_those_of_what_is_trained_and_sent(tiny_lm, family, modules):
    experts = dict(num_experts=4, moe_intermediate_size=16) if family == "Qwen3Moe" else {}
    if experts and modules != "all-linear":
        modules = ("q_proj",)
    config = LoraConfig(rank=3, target_modules=modules)
    lm = tiny_lm(family, **experts)
    sizes = adapter(config, read(lm.config.to_dict(), "student.model"))
    lora.wrap(lm, config, 0)
    beside = lora.adapters(lm)
    halves = [half for each in beside.values() for half in (each.a_RI, each.b_OR)]
    assert sizes.parameters == sum(half.numel() for half in halves)
    assert sizes.half == max(half.numel() for half in halves)
    assert sizes.largest == max(lora.plain(lm)[name].numel() for name in beside)
    alone = AdapterAlone(lm, 1 << 20, Gather()).layout().nbytes
    merged = StudentWeights(lm, 1 << 20, Gather()).described
    weights = [meta for meta in merged if len(meta.shape) == 2]
    assert 4 * sizes.parameters == alone
    assert 4 * sizes.merged == sum(meta.nbytes for meta in weights)


def learner(way: str | None, stage: int = 2, **config) -> memory.Memory:
    settings = LearnerConfig(trajectories_per_step=8, lr=1e-4, ranks=8, zero_stage=stage, **config)
    sync = SyncConfig(backend="nccl", lora=way)
    sizes = adapter(LORA, QWEN3) if way else None
    return memory.learner(settings, QWEN3, sync, BATCH, Needs(), sizes)


def test_a_learner_holds_optimizer_and_gradients_of_the_adapter_alone():
    whole, merged, alone = learner(None), learner("merged"), learner("adapter")
    trained = adapter(LORA, QWEN3).parameters
    assert merged.parts["optimizer"] == alone.parts["optimizer"] == 12 * trained / 8
    assert merged.parts["gradients"] == 4 * trained / 8
    assert merged.parts["weights"] == 2 * (QWEN3.parameters + trained)
    assert merged.total < 0.7 * whole.total
    assert merged.host < whole.host / 10


@pytest.mark.parametrize("stage", [2, 3])
def test_the_merged_send_counts_a_bucket_and_what_is_added_in_float32(stage):
    largest = QWEN3.hidden * QWEN3.intermediate
    bucket = 256 * 2**20 + 2 * largest
    held = learner("merged", stage).either["merged"]
    assert held == (12 + 2) * largest + (bucket if stage == 3 else 0)
    assert "merged" not in learner("adapter", stage).either
    assert learner("adapter").parts["buckets"] <= 2 * adapter(LORA, QWEN3).parameters
    assert learner("merged").parts["buckets"] == 2 * bucket


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_has_places_for_an_adapter_that_comes_alone(ranks):
    config = RolloutConfig(max_new_tokens=8, tensor_parallel_size=ranks)

    def engine(way: str) -> dict[str, float]:
        sync = SyncConfig(lora=way)
        sizes = adapter(LoraConfig(rank=9), QWEN3)
        return memory.generator(
            config, QWEN3, sync, 80 * GIB, concurrency=8, longest=64, adapter=sizes
        ).parts

    alone, merged = engine("adapter"), engine("merged")
    assert "adapter" not in merged
    # of rank 16, the next that vLLM knows
    whole = 2 * adapter(LORA, QWEN3).parameters
    assert whole / ranks <= alone["adapter"] <= whole
    assert alone["kv_cache"] == pytest.approx(merged["kv_cache"] - alone["adapter"])


@pytest.mark.parametrize("way", [None, "merged", "adapter"])
def test_a_plan_says_what_an_update_carries(way):
    adapters = ["student.lora.rank=16", f"sync.lora={way}"] if way else []
    cluster = Cluster(nodes=None, gpus_per_node=8, gpu_memory_gib=80)
    made = plan(ONE_NODE, adapters, cluster, None, None, offline=True)
    student = read(_shipped()[load(ONE_NODE, []).student.model], "student.model")
    sizes = adapter(LORA, student)
    carried = {None: student.parameters, "merged": sizes.merged, "adapter": sizes.parameters}[way]
    assert made.sent_gib == pytest.approx(2 * carried / GIB)
    size = {None: "3.20 GiB", "merged": "2.62 GiB", "adapter": "33.25 MiB"}[way]
    assert f"each update      {size} to each GPU of a generator" in lines(made)
    generator = next(role for role in made.roles if role.role == "generator")
    assert ("adapter" in generator.parts_gib) is (way == "adapter")
