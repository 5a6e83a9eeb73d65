from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from async_opd.core.wire import Needs
from async_opd.maths.logprobs import NOTHING, Read
from async_opd.objectives.opd import Opd
from async_opd.objectives.sampled import Importance
from async_opd.objectives.topk_kl import TopkKl
from async_opd.roles.learner.step import StepContext, Student, accumulate, batch_statistics
from tests.roles.learner.centred import Centred


def run(module, objective, micros, all_reduce=lambda tensor, op: None, teacher_weight=0.0):
    """One accumulation on one rank; returns its metrics and, where there is a model, its
    gradients."""
    metrics, _ = accumulate(
        module,
        lambda loss: loss.backward(),
        all_reduce,
        objective,
        micros,
        StepContext(max_lag_steps=2, teacher_weight=teacher_weight),
    )
    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    gradients = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return metrics, gradients


def plain_logp(student, sample):
    """Log-probs [T, V] of the response positions of one trajectory, by transformers alone,
    temperature 0.7."""
    ids = torch.as_tensor(np.concatenate([sample.prompt.ids, sample.rollout.ids])).long()
    student.lm.set_attn_implementation("eager")
    logits = student.lm(ids[None]).logits[0, len(sample.prompt.ids) - 1 : -1]
    student.lm.set_attn_implementation("packed_segments")
    return torch.log_softmax(logits / 0.7, dim=-1)


@pytest.fixture
def samples(sample):
    """Six trajectories of unequal lengths, one over the bound of the version they are packed at."""
    spans = [[(2, 4)], [(0, 2), (1, 3)], [(2, 1)], [(1, 7)], [(0, 3)], [(2, 5)]]
    return [sample(1 + i, spans[i], id=str(i), seed=i, truncated=i == 5) for i in range(6)]


@pytest.fixture
def bounds():
    return dict(live=2, max_lag_steps=1, truncated="mask")  # keeps 4 + 3 + 1 + 7 of 25 tokens


def test_packed_log_probs_equal_those_of_each_trajectory_alone(student, samples, packed):
    got_N = student(packed(*samples)).sampled_N
    alone = [
        plain_logp(student, s).gather(1, torch.as_tensor(s.rollout.ids).long()[:, None])[:, 0]
        for s in samples
    ]
    torch.testing.assert_close(got_N, torch.cat(alone), atol=1e-5, rtol=0)


def test_loss_and_gradients_are_those_of_the_formula_on_each_trajectory_alone(
    student, samples, packed, bounds
):
    metrics, gradients = run(
        student, Opd(correction=Importance(at_most=2.0)), [packed(*samples, **bounds)]
    )
    total = 0
    for s, kept in zip(
        samples, ([1] * 4, [0, 0, 1, 1, 1], [1], [1] * 7, [0] * 3, [0] * 5), strict=True
    ):
        logp_T = plain_logp(student, s).gather(1, torch.as_tensor(s.rollout.ids).long()[:, None])[
            :, 0
        ]
        rho_T = (logp_T - torch.as_tensor(s.rollout.behaviour_logp)).exp().clamp(max=2).detach()
        advantage_T = torch.as_tensor(s.scores.sampled_logp) - logp_T.detach()
        total += (torch.tensor(kept) * -rho_T * advantage_T * logp_T).sum()
    (total / 15).backward()
    assert metrics["loss"] == pytest.approx(total.item() / 15, abs=1e-5)
    for got, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cut", [[0, 2, 3, 6], [0, 1, 1, 6], [0, 0, 0, 6], [0, 4, 5, 6]])
def test_three_micro_batches_equal_one(student, samples, packed, bounds, cut):
    """Also where one is empty, and where one holds no kept token."""
    whole, expected = run(student, Opd(), [packed(*samples, **bounds)])
    micros = [packed(*samples[a:b], **bounds) for a, b in pairwise(cut)]
    parts, gradients = run(student, Opd(), micros)
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
    for got, parameter in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, parameter, atol=1e-6, rtol=1e-5)


@pytest.fixture
def counted(student):
    """The student, and the number of its forwards with and without gradient."""
    forwards = Counter()
    student.register_forward_hook(lambda *_: forwards.update([torch.is_grad_enabled()]))
    return student, forwards


def test_statistics_are_those_of_the_kept_tokens_of_the_formula(student, samples, packed, bounds):
    micros = [packed(*samples[:2], **bounds), packed(), packed(*samples[2:], **bounds)]
    found = batch_statistics(student, lambda tensor, op: None, Centred(), micros, StepContext())
    advantages = []
    for s, kept in zip(
        samples, ([1] * 4, [0, 0, 1, 1, 1], [1], [1] * 7, [0] * 3, [0] * 5), strict=True
    ):
        logp_T = plain_logp(student, s).gather(1, torch.as_tensor(s.rollout.ids).long()[:, None])[
            :, 0
        ]
        advantages.append(
            (torch.as_tensor(s.scores.sampled_logp) - logp_T)[torch.tensor(kept).bool()]
        )
    kept_N = torch.cat(advantages).detach()
    expected = dict(
        tokens=15.0,
        sequences=4.0,
        from_teacher=0.0,
        advantage=kept_N.sum().item(),
        largest=kept_N.max().item(),
    )
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("cut", [[0, 2, 3, 6], [0, 1, 1, 6], [0, 4, 5, 6]])
def test_gradients_by_statistics_of_the_batch_do_not_depend_on_its_split(
    student, samples, packed, bounds, cut
):
    whole, expected = run(student, Centred(), [packed(*samples, **bounds)])
    parts, gradients = run(
        student, Centred(), [packed(*samples[a:b], **bounds) for a, b in pairwise(cut)]
    )
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected)
    for got, parameter in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, parameter, atol=1e-6, rtol=1e-5)


def test_statistics_cost_a_forward_without_gradient_and_none_is_paid_where_none_are_declared(
    counted, samples, packed
):
    student, forwards = counted
    micros = [packed(*samples[:3]), packed(*samples[3:])]
    run(student, Opd(), micros)
    assert forwards == {True: 2}
    forwards.clear()
    run(student, Centred(), micros)
    assert forwards == {False: 2, True: 2}


def test_gradients_are_the_same_with_activation_checkpointing(student, samples, packed):
    metrics, expected = run(student, Opd(), [packed(*samples)])
    student.lm.train().gradient_checkpointing_enable({"use_reentrant": False})
    calls = Counter()
    student.lm.base_model.layers[0].input_layernorm.register_forward_hook(
        lambda *_: calls.update(["forward"])
    )
    again, gradients = run(student, Opd(), [packed(*samples)])
    assert calls["forward"] == 2  # recomputed in backward: it was at work
    assert again == pytest.approx(metrics, abs=1e-6)
    for got, parameter in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 1])
def test_without_a_token_to_keep_nothing_goes_backward(student, packed, sample, kept):
    """Not even where there are tokens to look at: they are counted."""
    cut, whole = sample(spans=[(2, 3)], truncated=True), sample(id="b", spans=[(2, 2)])
    micros = [packed(cut, truncated="mask"), packed(*[whole] * kept)]
    losses = []
    metrics, _ = accumulate(
        student, losses.append, lambda tensor, op: None, Opd(), micros, StepContext(max_lag_steps=2)
    )
    assert len(losses) == (2 if kept else 0)
    assert (metrics["tokens"], metrics["tokens_excluded"]) == (2 * kept, 3)
    assert (metrics["loss"] == 0) == (not kept)
    assert not [loss for loss in losses if not loss.requires_grad]


def test_a_rank_adds_its_share_of_the_global_mean(student, samples, packed):
    def with_a_twin(tensor, op):
        tensor.mul_(2 if op == "sum" else 1)

    alone, whole = run(student, Opd(), [packed(*samples)])
    both, half = run(student, Opd(), [packed(*samples)], with_a_twin)
    assert both == pytest.approx(alone | {"tokens": 50, "tokens_lag_0": 10})
    for got, expected in zip(half, whole, strict=True):
        torch.testing.assert_close(2 * got, expected, atol=1e-6, rtol=1e-5)


def test_a_not_a_number_at_a_prompt_position_reaches_neither_loss_nor_gradient(
    student, samples, packed
):
    micro = packed(*samples)
    expected, gradients = run(student, Opd(), [micro])

    def poison(module, args, out):
        unused = torch.ones(out.shape[1], dtype=torch.bool)
        unused[micro.rows_N] = False
        return out.masked_fill(unused[None, :, None], float("nan"))

    student.lm.base_model.norm.register_forward_hook(poison)
    metrics, poisoned = run(student, Opd(), [micro])
    assert metrics == expected
    assert all(torch.equal(a, b) for a, b in zip(poisoned, gradients, strict=True))


def test_all_of_the_vocabulary_as_candidates_trains_on_the_exact_kl(student, sample, packed):
    samples = []
    for i, tokens in enumerate([4, 2]):
        teacher_TV = torch.randn(
            tokens, 40, generator=torch.Generator().manual_seed(i)
        ).log_softmax(-1)
        top = teacher_TV.topk(40)
        nothing = np.full(tokens, NOTHING, np.float32)
        candidates = dict(
            topk_ids=top.indices.int().numpy(), topk_logp=top.values.numpy(), tail_logp=nothing
        )
        samples.append((sample(spans=[(0, tokens)], seed=i, **candidates), teacher_TV))
    metrics, gradients = run(student, TopkKl(k=40), [packed(*(s for s, _ in samples))])
    student_logp = [(plain_logp(student, s), teacher_TV) for s, teacher_TV in samples]
    exact = sum((p.exp() * (p - q)).sum() for p, q in student_logp) / 6
    exact.backward()
    assert metrics["loss"] == pytest.approx(exact.item(), abs=1e-5)
    for got, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_few_of_the_vocabulary_as_candidates_train_on_these_and_the_log_mass_of_all_others(
    student, sample, packed, divergence
):
    teacher_TV = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    top = teacher_TV.topk(3)
    tail_T = teacher_TV.scatter(1, top.indices, -torch.inf).logsumexp(1)
    candidates = dict(
        topk_ids=top.indices.int().numpy(), topk_logp=top.values.numpy(), tail_logp=tail_T.numpy()
    )
    one = sample(spans=[(0, 4)], **candidates)
    metrics, gradients = run(student, TopkKl(k=3, divergence=divergence), [packed(one)])
    student_TV = plain_logp(student, one)
    others_TV = student_TV.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
    p, q = (
        torch.cat([student_TV.gather(1, top.indices), others_TV], 1),
        torch.cat([top.values, tail_T[:, None]], 1),
    )
    exact = ((q.exp() * (q - p)) if divergence == "forward" else (p.exp() * (p - q))).sum() / 4
    exact.backward()
    assert metrics["loss"] == pytest.approx(exact.item(), abs=1e-5)
    for got, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=1e-5, rtol=1e-4)


def test_metrics_are_those_of_the_kept_tokens(sample, packed):
    ln2, ln1_5 = np.log(2), np.log(1.5)
    micros = [
        packed(
            # ratios 2 and 1.5
            sample(spans=[(3, 1), (5, 1)], behaviour=[-1 - ln2, -1 - ln1_5], teacher=[-0.7, -1.6]),
            sample(spans=[(5, 1)], behaviour=[-9], teacher=[-9], truncated=True),
            live=5,
            truncated="mask",
        ),
        packed(sample(spans=[(4, 1)], behaviour=[-2 + ln2], teacher=[-2.0]), live=5),  # ratio 0.5
    ]
    students = iter([torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-2.0])])
    metrics, _ = run(
        lambda micro, needs: Read(next(students).requires_grad_(), *[None] * 4), Opd(), micros
    )
    assert metrics == pytest.approx(
        {
            "tokens": 3,
            "tokens_excluded": 1,
            "loss": -0.1,  # (-2 · .3 · -1, -1.5 · -.6 · -1, 0): (.6 - .9 + 0) / 3
            "kl": 0.1,  # (-.3 + .6 + 0) / 3
            "entropy": (4 + ln1_5) / 3,  # 1 + ln 2, 1 + ln 1.5, 2 - ln 2
            "length_mean": 4 / 3,  # 2, 1 and 1 tokens
            "tokens_taught": 0,
            "loss_taught": 0,
            "selected": 1,
            "weight_mean": 0.5,  # 2 · .3, 1.5 · .6, .5 · 0
            "weight_max": 0.9,
            "weight_ess": 2.25 / 3.51,  # 1.5² / (3 · (.36 + .81))
            "weight_by_method": 0,
            # of two tokens: the differences of logarithms
            "weight_by_ratio": np.log(1.5 / 2) / np.log(0.9 / 0.6),
            "weight_by_advantage": np.log(0.6 / 0.3) / np.log(0.9 / 0.6),
            "ratio_mean": 4 / 3,
            "ratio_max": 2,
            "ratio_ess": 16 / 19.5,  # 4² / (3 · (4 + 2.25 + .25))
            "log_ratio_stale": ln2,  # (ln 2 + |-ln 2|) / 2
            "log_ratio_fresh_max": ln1_5,
            "lag_mean": 1,  # (2 + 0 + 1) / 3
            "lag_max": 2,
            "kv_lag_mean": 0,
            "tokens_lag_0": 1,
            "tokens_lag_1": 1,
            "tokens_lag_2": 1,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("cut", [[0, 2, 4], [0, 1, 4], [0, 0, 4]])
def test_the_teachers_own_answers_add_their_mean_cross_entropy_whatever_the_split(
    student, sample, packed, cut
):
    own = [
        replace(sample(1 + i, [(0, 2 + i)], id=f"own {i}", seed=i), scores=None) for i in range(4)
    ]
    rollouts = packed(*(sample(2, [(0, 3)], id=str(i), seed=9 + i) for i in range(2)))
    _, alone = run(student, Opd(), [rollouts])
    micros = [rollouts, *(packed(*own[a:b]) for a, b in pairwise(cut))]
    metrics, gradients = run(student, Opd(), micros, teacher_weight=0.5)
    picked = [
        plain_logp(student, s).gather(1, torch.as_tensor(s.rollout.ids).long()[:, None])
        for s in own
    ]
    entropy = -torch.cat(picked).mean()
    (0.5 * entropy).backward()
    assert metrics["tokens_taught"] == 14  # 2 + 3 + 4 + 5
    assert metrics["loss_taught"] == pytest.approx(entropy.item(), abs=1e-5)
    for got, plain, parameter in zip(gradients, alone, student.parameters(), strict=True):
        torch.testing.assert_close(got, plain + parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_loss_that_is_not_finite_shows_in_the_metrics(student, samples, packed):
    with torch.no_grad():
        student.lm.base_model.norm.weight[0] = float("inf")
    metrics, _ = run(student, Opd(), [packed(*samples)])
    assert not np.isfinite(metrics["loss"])


def test_ids_that_are_no_tokens_are_not_what_log_probs_are_over(student, sample, packed):
    """Rows 5 to 7 are a hole, those from 33 on padding, however likely."""
    kept = [*range(5), *range(8, 33)]
    head = student.lm.get_output_embeddings()
    head.weight.data[[6, 35]] *= 20
    narrow = Student(student.lm, temperature=0.7, chunk_rows=3, vocabulary=((0, 5), (8, 33)))
    one = sample(
        spans=[(0, 30)],
        topk_ids=np.tile(np.int32(kept[:2]), (30, 1)),
        topk_logp=np.full((30, 2), -1, np.float32),
    )
    micro = packed(one)
    read = narrow(micro, Needs(student_entropy=True, tail=True))
    ids = torch.tensor([[*one.prompt.ids, *one.rollout.ids]]).long()
    logits_LV = student.lm(ids, segment_lengths=[ids.shape[1]]).logits[0]
    logits = logits_LV[len(one.prompt.ids) - 1 : -1]
    logp_TV = torch.full_like(logits, -torch.inf)
    logp_TV[:, kept] = (logits[:, kept] / 0.7).log_softmax(-1)
    known = torch.isin(micro.targets_N, torch.tensor(kept))
    expected = logp_TV.gather(1, micro.targets_N[:, None])[:, 0]
    assert 0 < known.sum() < 30
    torch.testing.assert_close(read.sampled_N[known], expected[known], atol=1e-5, rtol=0)
    assert read.sampled_N[~known].isnan().all()
    torch.testing.assert_close(read.tail_N, logp_TV[:, kept[2:]].logsumexp(1), atol=1e-5, rtol=0)
    entropy_T = torch.distributions.Categorical(logits=logp_TV[:, kept]).entropy()
    torch.testing.assert_close(read.entropy_N, entropy_T, atol=1e-5, rtol=0)
    read.entropy_N.sum().backward()
    assert not head.weight.grad[[5, 6, 7, *range(33, 40)]].any()
