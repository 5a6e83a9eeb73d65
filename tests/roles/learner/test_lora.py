"""An adapter beside a student's weights: against the weights themselves, and against loops."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch

from async_opd.core.errors import ConfigError
from async_opd.core.lora import LoraConfig
from async_opd.objectives.opd import Opd
from async_opd.roles.learner import checkpoint, lora
from async_opd.roles.learner.step import StepContext, Student, accumulate
from async_opd.roles.learner.weights import StudentWeights
from async_opd.roles.models import causal_lm
from async_opd.roles.teacher.self_teacher import WeightEma, read_parameters
from async_opd.toy.tokenizer import build_tokenizer

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GLM = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1
)
GPT2 = dict(n_embd=32, n_head=4, n_layer=2, n_inner=48, bos_token_id=1, eos_token_id=1)
FAMILIES = [
    ("Qwen3", dict(tie_word_embeddings=True)),
    ("Qwen2", dict(tie_word_embeddings=False)),  # biases
    ("GPT2", GPT2),  # whose weights are [in, out]
    ("Qwen3Moe", EXPERTS),
    ("HrmText", {}),  # fused in the checkpoint alone
    ("GPTNeoX", {}),
    ("Glm4Moe", GLM),  # with a dense layer and a shared expert
]
families = pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=lambda x: str(x)[:8])
INTO_32 = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # 32 inputs each
CONTEXT = StepContext(max_lag_steps=4)


@pytest.fixture
def micros(sample, packed):
    return [
        packed(sample(3, [(0, 6)], id="a", seed=1), sample(2, [(0, 4)], id="b", seed=2)),
        packed(sample(4, [(0, 5)], id="c", seed=3)),
    ]


def student(lm):
    return Student(lm, temperature=0.7)


def step(module, micros):
    """Gradients of one step, by parameter."""
    accumulate(module, lambda loss: loss.backward(), lambda *_: None, Opd(), micros, CONTEXT)
    return {p: p.grad for p in module.parameters() if p.grad is not None}


def whole(lm):
    return StudentWeights(lm, 4096, lambda weights: nullcontext()).copied(keep=True)


def random_b(lm):
    """Move every B away from 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in lora.adapters(lm).values():
            adapter.b_OR.copy_(0.1 * torch.randn(adapter.b_OR.shape, generator=generator))


@pytest.fixture
def plain(tiny_lm):
    def plain(family="Qwen3", dtype=torch.float32, **settings):
        lm = tiny_lm(family, attn_implementation=causal_lm.ATTENTION, **settings)
        return lm.to(dtype).eval()

    return plain


def test_with_an_orthogonal_a_the_first_step_on_b_is_a_full_step_on_the_weights(plain, micros):
    """A Aᵀ = I, B = 0, alpha = rank: B becomes -lr · G Aᵀ, so that B A is -lr · G."""
    full = plain()
    adapted = deepcopy(full)
    lora.wrap(adapted, LoraConfig(rank=32, target_modules=INTO_32), seed=0)
    adapters = lora.adapters(adapted)
    with torch.no_grad():
        for number, adapter in enumerate(adapters.values()):
            generator = torch.Generator().manual_seed(number)
            adapter.a_RI.copy_(torch.linalg.qr(torch.randn(32, 32, generator=generator))[0])
    step(student(full), micros)
    gradients = step(student(adapted), micros)
    for adapter in adapters.values():  # where B is 0 nothing reaches A
        assert gradients[adapter.a_RI].abs().max() == 0
        adapter.b_OR.data -= 0.05 * gradients[adapter.b_OR]
    weights, moved = dict(full.named_parameters()), 0.0
    for name, weight in whole(adapted).items():
        expected = weights[name].detach()
        if name in adapters:
            expected = expected - 0.05 * weights[name].grad
            moved = max(moved, (expected - weights[name]).abs().max().item())
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5, msg=name)
    assert len(adapters) == 10 and moved > 1e-2


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (8.0, 2.0), (1.0, 0.25)])
def test_gradients_of_a_and_b_are_those_of_a_loop_over_tokens(plain, micros, alpha, scaling):
    lm = plain()
    lora.wrap(lm, LoraConfig(rank=4, alpha=alpha, target_modules=("up_proj",)), seed=0)
    random_b(lm)
    seen = []  # inputs [L, I] and gradients of outputs [L, O] of one layer
    layer = dict(lm.named_modules())["model.layers.1.mlp.up_proj"]

    def watch(_, inputs, output):
        seen.append([inputs[0][0].detach()])
        output.register_hook(lambda gradient, at=seen[-1]: at.append(gradient[0]))

    layer.register_forward_hook(watch)
    gradients = step(student(lm), micros)
    adapter = lora.adapters(lm)["model.layers.1.mlp.up_proj.weight"]
    a, b = adapter.a_RI.detach(), adapter.b_OR.detach()
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for inputs, outputs in seen:
        for x, g in zip(inputs, outputs, strict=True):
            for r in range(4):
                through = sum(b[o, r] * g[o] for o in range(len(g)))
                expected_a[r] += scaling * through * x
                expected_b[:, r] += scaling * g * sum(a[r, i] * x[i] for i in range(len(x)))
    assert expected_a.abs().max() > 1e-3 and expected_b.abs().max() > 1e-3
    torch.testing.assert_close(gradients[adapter.a_RI], expected_a, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradients[adapter.b_OR], expected_b, atol=1e-6, rtol=1e-4)


@families
def test_the_weights_that_leave_are_w_plus_s_b_a_by_the_plain_names_and_w_stays(
    plain, family, settings
):
    lm = plain(family, **settings)
    before = {name: weight.clone() for name, weight in lm.named_parameters()}
    layout = StudentWeights(lm, 4096, lambda weights: nullcontext()).layout()
    ids, lengths = torch.arange(2, 12), [6, 4]
    logits = causal_lm.head(lm).logits(causal_lm.hidden_states(lm, ids, lengths))
    lora.wrap(lm, LoraConfig(rank=3, alpha=4.5), seed=0)
    # B is 0: it is still the student
    hidden = causal_lm.hidden_states(lm, ids, lengths)
    assert torch.equal(causal_lm.head(lm).logits(hidden), logits)
    random_b(lm)
    adapted = causal_lm.head(lm).logits(causal_lm.hidden_states(lm, ids, lengths))
    weights = StudentWeights(lm, 4096, lambda weights: nullcontext())
    left = weights.copied(keep=True)
    assert set(weights.layout().names) <= set(layout.names) and left.keys() == before.keys()
    for name, adapter in lora.adapters(lm).items():
        o, r = adapter.b_OR.shape
        delta = torch.zeros(o, adapter.a_RI.shape[1], dtype=torch.float64)
        for k in range(r):
            delta += 1.5 * torch.outer(adapter.b_OR[:, k].double(), adapter.a_RI[k].double())
        delta = delta.T if family == "GPT2" else delta
        expected = (before[name].double() + delta).float()
        torch.testing.assert_close(left[name], expected, atol=1e-6, rtol=1e-6)
    whole = plain(family, **settings)
    whole.load_state_dict(left, strict=False)
    merged = causal_lm.head(whole).logits(causal_lm.hidden_states(whole, ids, lengths))
    torch.testing.assert_close(merged, adapted, atol=3e-4, rtol=1e-4)
    assert (adapted - logits).abs().max() > 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in lora.plain(lm).items())
    head = lm.get_output_embeddings()
    assert not any("embed" in n or "lm_head" in n for n in lora.adapters(lm)) and head is not None
    trained = [p for p in lm.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(lora.adapters(lm)) and trained


def test_what_is_added_in_bfloat16_is_rounded_once(plain):
    lm = plain(dtype=torch.bfloat16)
    lora.wrap(lm, LoraConfig(rank=8, alpha=3.0), seed=0)
    random_b(lm)
    assert {weight.dtype for weight in lm.parameters()} == {torch.bfloat16}
    left = whole(lm)
    for name, adapter in lora.adapters(lm).items():
        a, b = adapter.a_RI.double(), adapter.b_OR.double()
        exact = lora.plain(lm)[name].double() + 0.375 * (b @ a)
        error = (left[name].double() - exact).abs()
        # half a unit in the last place of eight bits
        assert (error <= exact.abs() * 2**-8 * (1 + 1e-4) + 1e-12).all(), name
        assert left[name].dtype == torch.bfloat16


def test_ranks_begin_alike_by_the_seed_and_other_random_numbers_go_on_as_they_were(plain):
    made = []
    for seed, burnt in ((1, 0), (1, 7), (2, 0)):
        lm = plain()
        torch.manual_seed(3)
        torch.rand(burnt)
        expected = torch.get_rng_state()
        lora.wrap(lm, LoraConfig(rank=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), expected)
        made.append([adapter.a_RI for adapter in lora.adapters(lm).values()])
        assert not any(adapter.b_OR.any() for adapter in lora.adapters(lm).values())
    first, same, other = made
    assert all(map(torch.equal, first, same)) and not any(map(torch.equal, first, other))


def test_gradients_go_through_layers_that_are_computed_anew_though_embeddings_are_frozen(
    plain, micros
):
    lm = plain().train()
    lora.wrap(lm, LoraConfig(rank=3), seed=0)
    random_b(lm)
    kept = {p: g.clone() for p, g in step(student(lm), micros).items()}
    lm.zero_grad()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    anew = step(student(lm), micros)
    assert len(kept) == len(anew) == 28
    for parameter, gradient in kept.items():
        assert gradient.any()
        torch.testing.assert_close(anew[parameter], gradient)


def test_every_pass_over_a_micro_batch_drops_the_same_and_a_probe_nothing(plain, micros):
    lm = plain().train()
    lora.wrap(lm, LoraConfig(rank=3, dropout=0.5), seed=0)
    random_b(lm)
    module = student(lm)
    state = torch.get_rng_state()

    def read(seed, micro):
        masked = lora.one_mask(module, micros, seed)
        return masked(micro, Opd().needs()).sampled_N.detach()

    first = [read((0, 1, 0), micro) for micro in micros]
    assert all(torch.equal(read((0, 1, 0), m), x) for m, x in zip(micros, first, strict=True))
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):  # seed, step, rank
        assert not torch.equal(read(other, micros[0]), first[0])
    twins = [micros[0], deepcopy(micros[0])]
    masked = lora.one_mask(module, twins, (0, 1, 0))
    assert not torch.equal(*(masked(m, Opd().needs()).sampled_N for m in twins))
    assert torch.equal(torch.get_rng_state(), state)
    with lora.undropped(lm):
        live = module(micros[0]).sampled_N.detach()
    assert not torch.equal(live, first[0]) and lm.training
    assert not torch.equal(module(micros[0]).sampled_N, live)  # it goes on to drop
    lm.eval()
    assert torch.equal(module(micros[0]).sampled_N, live)


def test_who_puts_an_adapter_on_no_card_starts_none(plain, monkeypatch):
    """The launch does it on the meta device: a look at the random numbers of the cards would hold
    memory on each of them as long as the run goes on."""

    def started(device):
        raise AssertionError(f"card {device}")

    lm = plain().to("meta")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", started)
    lora.wrap(lm, LoraConfig(rank=2), seed=0)
    assert lora.adapters(lm)


def test_only_layers_that_are_asked_for_have_an_adapter(plain):
    lm = plain()
    names = ("q_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj")
    lora.wrap(lm, LoraConfig(rank=2, target_modules=names), seed=0)
    assert sorted(lora.adapters(lm)) == [
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]


LAYERS = "linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["q_prj"], f"'q_prj' is no linear layer of it; {LAYERS}; did you mean 'q_proj'?"),
        (["q_proj", "c_attn"], f"'c_attn' is no linear layer of it; {LAYERS}"),
        (["lm_head"], "'lm_head' is the head of it"),
        (["embed_tokens"], "'embed_tokens' is no linear layer of it"),
        (["mlp"], "'mlp' is no linear layer of it"),
        (["roj"], "'roj' is no linear layer of it"),
        (
            ["layers.7.mlp.up_proj"],
            "'layers.7.mlp.up_proj' is no linear layer of it; linear layers are down_proj,",
        ),
    ],
)
def test_what_is_no_linear_layer_is_refused_with_what_there_is(plain, asked, words):
    with pytest.raises(ConfigError) as raised:
        lora.targets(plain(), LoraConfig(rank=2, target_modules=tuple(asked)), "it")
    assert f"{raised.value}".startswith(f"student.lora.target_modules = {asked!r}: {words}")


@pytest.mark.parametrize("asked", ["down_proj", "mlp.gate_proj", "up_proj"])
def test_what_peft_takes_for_experts_is_left_out_and_refused_by_name(plain, asked):
    """It would train those in its place, and nothing of them would leave the learner."""
    lm = plain("Glm4Moe", **GLM)
    attention = {f"{kind}_proj" for kind in "qkvo"}
    names = lora.targets(lm, LoraConfig(rank=2), "it")
    assert {name.rpartition(".")[2] for name in names} == attention and len(names) == 8
    with pytest.raises(
        ConfigError, match=f"'{asked}' is by its name, for peft, one of the experts"
    ):
        lora.targets(lm, LoraConfig(rank=2, target_modules=("q_proj", asked)), "it")
    lora.wrap(lm, LoraConfig(rank=2), seed=0)
    assert sorted(lora.adapters(lm)) == sorted(f"{name}.weight" for name in names)


def test_another_base_has_another_sum(plain, tiny_lm):
    lm = plain()
    lora.wrap(lm, LoraConfig(rank=2), seed=0)
    before = lora.base_sum(lm)
    random_b(lm)
    assert lora.base_sum(lm) == before
    with torch.no_grad():
        lm.model.norm.weight[3] += 1e-6
    assert lora.base_sum(lm) != before


@pytest.mark.parametrize("padding", [0.0, 1e9, float("nan")])
def test_what_pads_the_part_of_a_rank_is_in_no_sum(padding):
    """Under ZeRO-3 it is as the memory was."""
    whole = torch.arange(1.0, 8.0)
    weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    weight.ds_numel, sums = 7, []
    for rank in range(4):  # two more than it takes
        part = torch.full((4,), padding)
        mine = whole[4 * rank : 4 * rank + 4]
        part[: len(mine)] = mine
        weight.ds_tensor, weight.ds_zero_partition_rank = part, rank
        sums.append(lora.base_sum(torch.nn.ParameterList([weight])))
    expected = lora.base_sum(torch.nn.ParameterList([torch.nn.Parameter(whole, False)]))
    assert sum(sums) == expected and sums[2:] == [0, 0]


def test_a_self_teacher_reads_the_merged_weights_as_those_of_any_student(plain, tmp_path):
    lm, base = plain(), tmp_path / "base"
    build_tokenizer().save_pretrained(base)
    lm.config.save_pretrained(base)
    lora.wrap(lm, LoraConfig(rank=3, alpha=6.0), seed=0)
    random_b(lm)
    checkpoint.save(lm, whole(lm), checkpoint.read_source(str(base)), tmp_path / "whole")
    teacher = plain()
    WeightEma(teacher, decay=None).update(read_parameters(str(tmp_path / "whole"), type(teacher)))
    ids = torch.arange(2, 12)
    adapted, copied = (causal_lm.hidden_states(each, ids, [6, 4]) for each in (lm, teacher))
    torch.testing.assert_close(copied, adapted, atol=1e-4, rtol=1e-4)
    assert all(map(torch.equal, teacher.parameters(), whole(lm).values()))
