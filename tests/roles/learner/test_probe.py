"""The parity probe on real models in bfloat16: what rounding and flipping routers make of it, and
what one layer's last shard does that is not the learner's."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from async_opd import toy
from async_opd.driver.parity import EACH_HALF, FIRST, Gap, HalfPrecision, Parity, requests
from async_opd.roles.learner.batch import MicroBatch, TrainingBounds, pack
from async_opd.roles.learner.probe import probe_batches
from async_opd.roles.learner.step import Student
from async_opd.roles.models import causal_lm
from async_opd.toy.build import TOKENIZER
from async_opd.toy.task import draw, prompt

CPU = torch.device("cpu")
BOUNDS = TrainingBounds(max_lag_steps=4, stale="mask", truncated="train", cap=64)
SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.1,  # so that it prefers some tokens, as one that is trained does
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)


def models():
    torch.manual_seed(0)
    return {
        "toy student": lambda: causal_lm.load(toy.WEIGHTS / "student", "bfloat16", CPU),
        "toy teacher": lambda: causal_lm.load(toy.WEIGHTS / "teacher", "bfloat16", CPU),
        "random": lambda: saved(Qwen3ForCausalLM(Qwen3Config(**SMALL))),
        "experts": lambda: saved(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS))),
    }


def saved(model):
    """As `causal_lm.load` has it."""
    model.set_attn_implementation(causal_lm.ATTENTION)
    return model.bfloat16()


def prompts(model, count: int) -> torch.Tensor:
    """So many, of one length."""
    if model.config.vocab_size == SMALL["vocab_size"]:
        return torch.randint(0, 512, (count, 12), generator=torch.Generator().manual_seed(count))
    rng, rows = Random(count), []
    while len(rows) < count:
        ids = TOKENIZER(prompt(draw(rng)))["input_ids"]
        if not rows or len(ids) == len(rows[0]):
            rows.append(ids)
    return torch.tensor(rows)


@torch.no_grad()
def measured(generator, learner, times: int) -> Gap:
    """`generator` samples, all requests as one padded batch, and `learner` reads them packed."""
    ids_BL = prompts(learner, times * requests(EACH_HALF))
    length = ids_BL.shape[1]
    draw = torch.Generator().manual_seed(times)
    logp = []
    for _ in range(EACH_HALF):
        rows = [len(ids_BL[0])] * len(ids_BL)
        hidden = causal_lm.hidden_states(generator, ids_BL.flatten(), rows)
        logits_BV = generator.lm_head(hidden.view(*ids_BL.shape, -1)[:, -1]).float()
        next_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=draw)
        logp.append(logits_BV.log_softmax(-1).gather(1, next_B1))
        ids_BL = torch.cat([ids_BL, next_B1], 1)
    ids = [part.numpy() for row in ids_BL.int() for part in (row[:length], row[length:])]
    student = Student(learner, temperature=1.0, chunk_rows=1024)
    read = [student(micro).sampled_N.float() for micro in probe_batches(ids, empty(), 1000)]
    return Gap.of(torch.cat(read).numpy(), torch.cat(logp, 1).flatten().numpy())


def empty() -> MicroBatch:
    return pack([], BOUNDS, live=0, device=CPU)


def with_stale_shard(model, layer: int):
    """`model` as finding of a broken update has it: of one fused layer the last shard, the values
    of grouped attention, is what memory held."""
    stale = copy.deepcopy(model)
    weight = stale.base_model.layers[layer].self_attn.v_proj.weight
    torch.manual_seed(7)
    weight.data.copy_(torch.randn_like(weight) * weight.std())
    return stale


@pytest.mark.parametrize("name", ["toy student", "toy teacher", "random", "experts"])
def test_a_stale_shard_of_one_layer_is_far_from_what_rounding_does(name):
    learner = models()[name]()
    # an engine rounds elsewhere: here it computes in float32 from the same weights
    generator = copy.deepcopy(learner).float()
    parity = Parity(1e-3, HalfPrecision(0.1, 0.05), lambda *event: None)
    first = measured(generator, learner, FIRST)
    assert parity.allows(first) and first.largest > 1e-3, first  # which float32 would not allow
    parity.measured(0, first)
    later = measured(generator, learner, 1)
    assert parity.allows(later) and later.mean < 0.03, later
    stale = measured(with_stale_shard(generator, len(learner.base_model.layers) - 1), learner, 1)
    assert not parity.allows(stale) and stale.mean > 5 * first.mean + 0.1, stale


def test_probes_are_packed_within_the_bound_and_read_in_their_order():
    ids = [np.arange(n, dtype=np.int32) for n in (3, 2, 5, 4, 1, 1, 30, 1, 2, 2)]
    micros = [*probe_batches(ids, empty(), 12)]
    assert [micro.segment_lengths for micro in micros] == [[5], [9, 2], [31], [4]]
    assert [micro.rows_N.tolist() for micro in micros] == [[2, 3], [4, 5, 6, 7, 9], [29], [1, 2]]
    assert torch.cat([micro.targets_N for micro in micros]).tolist() == [
        0,
        1,
        0,
        1,
        2,
        3,
        0,
        0,
        0,
        1,
    ]
    for micro in micros:
        assert len(micro.ids_L) == sum(micro.segment_lengths)
