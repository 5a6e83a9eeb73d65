"""What every objective must keep, under every correction and with every weight and mask that
composes, tested for each file of the folder as soon as it exists."""

import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache, reduce
from itertools import cycle, islice
from operator import or_

import msgspec
import numpy as np
import pytest
import torch

from async_opd.core.lora import LoraConfig
from async_opd.core.wire import Prompt, Rollout, Scores, Span, Verdict
from async_opd.maths.advantages import Moments
from async_opd.maths.logprobs import Head, ReadOptions, read_logprobs
from async_opd.objectives import all_objectives
from async_opd.objectives.eopd import Eopd
from async_opd.objectives.freshness import Freshness
from async_opd.objectives.mc_opd import McOpd
from async_opd.objectives.modifiers import DriftGate, Position, PrefixRatio, RandomShare
from async_opd.objectives.reward import Reward
from async_opd.objectives.sampled import Importance, Ppo, Sampled
from async_opd.roles.learner import lora
from async_opd.roles.learner.batch import TrainingBounds, Trajectory, pack
from async_opd.roles.learner.step import (
    StepContext,
    Student,
    accumulate,
    batch_statistics,
    token_batch,
)
from async_opd.roles.models import causal_lm

SETTINGS = {  # the required settings of each tag, then those of its other branches
    "opd": [{}, {"student_signal": "cached"}],
    "g_opd": [{}, {"lam": 1.0}],
    "iw_opd": [{}, {"total": "before_last", "lam": 1.25}],
    "dear": [{}, {"p": 0.5, "q": 1.0, "mean_over": "tokens"}],
    "sg_opd": [
        {},
        {"beta": 0.0, "student_signal": "cached"},
        {"fallback": "grpo"},
        {"fallback": "preserve", "lambda_base": 1.25},
    ],
    "egrsd": [{}, {"gamma": 0.0}],
    "cl_egrsd": [{}, {"gamma": 1.0, "window": 0}],
    "mc_opd": [{}, {"m": 1}, {"m": 3, "student_signal": "cached"}],
    "topk_kl": [
        {"k": 3, "divergence": divergence, "support": support, "rest": rest}
        for divergence, support, rest in [
            ("reverse", "teacher", "bucket"),
            ("forward", "student", "bucket"),
            ("jensen_shannon", "teacher", "bucket"),
            ("reverse", "student", "renormalise"),
            ("forward", "teacher", "drop"),
            ("jensen_shannon", "student", "drop"),
            ("reverse", "teacher", "sampled"),
            ("reverse", "student", "sampled"),
        ]
    ],
    "eopd": [{"k": 3, "rest": rest} for rest in ("renormalise", "bucket", "drop")],
    "top_d": [
        {},
        {"alpha": 1.0, "future": True},
        {"future": True, "normalise": True},
        {"normalise": True, "student_signal": "cached"},
    ],
    "renio": [{}, {"tau": 0.3, "clip": 1.0, "mean_over": "tokens"}, {"student_signal": "cached"}],
    "rg_opd": [
        {"k": 3},
        {"k": 3, "margin": 0.2},
        {"k": 2, "rest": "sampled", "support": "teacher"},
    ],
    "opsa": [{}, {"entropy": False, "share": 0.5}],
}
LEARNS_FROM_AGREEMENT = {  # where a method has a signal although student and teacher agree, by tag
    "egrsd": lambda o: True,  # the verdict
    "cl_egrsd": lambda o: True,
    # where the teacher is not the reference
    "g_opd": lambda o: o.lam != 1,
    "iw_opd": lambda o: o.lam != 1,
    # by a fallback other than the plain signal
    "sg_opd": lambda o: o.fallback == "grpo" or (o.fallback == "preserve" and o.lambda_base != 1),
    # where the rest is dropped: Σ_k p_k ∇log p_k is no longer 0 (in the generalised JSD it cancels)
    "topk_kl": lambda o: o.rest == "drop" and o.divergence != "jensen_shannon",
    # over the k alone, Σ_k π_T ∇log π is not 0
    "eopd": lambda o: o.rest != "bucket",
    "opsa": lambda o: True,  # there is no teacher in it
}
CORRECTIONS = [
    Importance(),
    Importance(ratio="none"),
    Importance(at_most=1.5),
    Importance(between=(0.3, 3.0)),
    Importance(ratio="sequence", at_most=5.0),
    Importance(ratio="geometric"),
    Importance(ratio="prefix", at_most=5.0),
    Importance(ratio="prefix_normalised", narrowing=(0.3, 0.5)),
    Ppo(),
    Ppo(clip=0.3, dual_clip=1.5),
]
PREFIXES = [None, PrefixRatio(), PrefixRatio(at_most=1.5), PrefixRatio(between=(0.3, 3.0))]
COMPOSED = [
    {},
    dict(drift_gate=DriftGate(block=2)),
    dict(position=Position(share=0.5)),
    dict(random=RandomShare(share=0.5)),
    dict(position=Position(share=0.3, part="suffix"), constant=2.0),
    dict(drift_gate=DriftGate(tau=0.3), random=RandomShare(share=0.7)),
    dict(signal_at_most=0.3, weight_at_most=1.1),
    dict(signal_at_most=1.0, drift_gate=DriftGate(block=2), position=Position(share=0.6)),
    dict(freshness=Freshness(xi=0.05)),
    dict(freshness=Freshness(lam=0.0, age="largest"), random=RandomShare(share=0.5)),
]
REWARDS = [
    None,
    Reward(),
    Reward(weight=0.5, baseline="running", length_penalty=0.3),
    Reward(baseline="none", length_penalty=2.0),
]
MEANS = ["tokens", "selected", "sequences"]


def combinations() -> Iterator:
    """Each objective with each of its corrections, and its other branches with two of them; each
    time with the next of what composes and the next mean, over the selected tokens where some are
    selected. What corrects the state twice is refused, so the next that does not is taken."""
    composed, means, rewards = cycle(COMPOSED), cycle(MEANS), cycle(REWARDS)
    for tag, cls in all_objectives().items():
        known = {f.name for f in msgspec.structs.fields(cls)}
        stale = [{"correction": c} for c in CORRECTIONS] if "correction" in known else []
        stale += [{"prefix": p} for p in PREFIXES] if "prefix" in known else []
        others = cycle(stale)
        for i, settings in enumerate(SETTINGS.get(tag, [])):
            for changes in stale if i == 0 else islice(others, 2):
                of_prefix = changes.get("prefix") or getattr(
                    changes.get("correction"), "of_prefix", False
                )
                more = next(
                    m for m in composed if not (of_prefix and {"drift_gate", "freshness"} & set(m))
                )
                mean, selects = next(means), {"position", "random"} & set(more)
                if mean == "selected" and tag not in ("dear", "rg_opd", "opsa") and not selects:
                    mean = "tokens"
                beside = {"reward": next(rewards)} if "reward" in known else {}
                yield cls(**(more | dict(mean_over=mean) | beside | changes | settings))


PLAIN = [
    cls(**settings) for tag, cls in all_objectives().items() for settings in SETTINGS.get(tag, [])
]
CASES = list(dict.fromkeys(combinations()))
name = lambda objective: type(objective).__name__  # noqa: E731
every = pytest.mark.parametrize("objective", CASES, ids=name)
plain = pytest.mark.parametrize("objective", PLAIN, ids=name)

V, D = 12, 5
# prompt and response tokens, version spans, truncated, verdicts of the group (the first is its own)
TRAJECTORIES = [
    (3, [(4, 4)], False, (1, 0, None)),
    (1, [(2, 1)], False, (0, 1, None)),  # one token
    (2, [(0, 2), (3, 4)], False, (1, 1, 1)),  # two tokens over the bound; a group that is all right
    (4, [(1, 3)], False, (None, 0, 1)),  # an unknown verdict
    (2, [(4, 3)], True, (0, 0, 1)),  # truncated
    (5, [(0, 2)], False, (1, 0, 0)),  # all over the bound
]
GROUPS = [0, 1, 0, 1, 2, 0]  # whose moments are over several micro-batches and ranks
KEPT = [True] * 5 + [False] * 2 + [True] * 7 + [False] * 5
CONTEXT = StepContext(
    step=12,
    groups=3,
    running={"reward": Moments(7.0, 0.6, 2.0), "task_reward": Moments(9.0, 0.4, 2.0)},
)


class Tiny(torch.nn.Module):
    """A student of two matrices in float64. Every position adds what `inputs` holds for it, and
    keeps its gradient."""

    def __init__(self):
        super().__init__()
        self.embedding_VD, self.head_VD = (
            torch.nn.Parameter(
                torch.randn(V, D, generator=torch.Generator().manual_seed(s)).double()
            )
            for s in (0, 1)
        )
        self.inputs_LD = []

    def forward(self, micro, needs=None):
        parts = [
            self.embedding_VD[ids].cumsum(0) for ids in micro.ids_L.split(micro.segment_lengths)
        ]
        unused = torch.ones(len(micro.ids_L), dtype=bool).index_fill(0, micro.rows_N, False)
        inputs_LD = (
            torch.zeros(len(unused), D)
            .double()
            .masked_fill(unused[:, None], float("nan"))
            .requires_grad_()
        )
        self.inputs_LD.append(inputs_LD)
        hidden_ND = (torch.cat(parts) + inputs_LD)[micro.rows_N]
        options = ReadOptions(1.0, chunk_rows=64)
        if needs:
            options = options._replace(entropy=needs.student_entropy, tail=needs.tail)
        read = read_logprobs(
            hidden_ND,
            Head(self.head_VD),
            micro.targets_N,
            options,
            candidate_ids_NK=micro.candidate_ids_NK,
        )
        return read._replace(hidden_ND=hidden_ND.detach() if needs and needs.hidden_state else None)


@cache
def sample(i, needs):
    """The i-th trajectory with what `needs` asks for, from a policy not far from the student."""
    prompt_tokens, spans, truncated, verdicts = TRAJECTORIES[i]
    tokens, generator = sum(n for _, n in spans), torch.Generator().manual_seed(i)
    ids_L = torch.randint(V, (prompt_tokens + tokens,), generator=generator)
    policies = 1.5 * torch.randn(3, tokens, V, generator=generator).double()
    student = Tiny()
    hidden_TD = student.embedding_VD[ids_L].cumsum(0)[prompt_tokens - 1 : -1]
    policies[0] = (hidden_TD @ student.head_VD.T + policies[0] / 3).detach()
    behaviour, teacher, reference = policies.log_softmax(-1)
    at = ids_L[prompt_tokens:, None]
    top, more = teacher.topk(needs.teacher_topk), needs.teacher_at_student_ids
    sampled = needs.student_ids == "sampled"
    own = torch.multinomial(behaviour.exp(), max(more, 1), replacement=True, generator=generator)
    own = (own if sampled else behaviour.topk(max(more, 1)).indices)[:, :more]
    outside = teacher.scatter(1, own if more else top.indices, -torch.inf).logsumexp(1)
    array = lambda x: x.float().numpy()  # noqa: E731
    ends = np.cumsum([n for _, n in spans]).tolist()
    id = f"{i}@0#0"
    rollout = Rollout(
        id=id,
        ids=ids_L[prompt_tokens:].int().numpy(),
        behaviour_logp=array(behaviour.gather(1, at)[:, 0]),
        spans=tuple(
            Span(version=v, start=end - n, end=end) for (v, n), end in zip(spans, ends, strict=True)
        ),
        truncated=truncated,
        candidate_ids=own.int().numpy() if more else None,
        candidate_logp=array(behaviour.gather(1, own)) if more and sampled else None,
    )
    scores = Scores(
        id=id,
        sampled_logp=array(teacher.gather(1, at)[:, 0]),
        topk_ids=top.indices.int().numpy() if needs.teacher_topk else None,
        topk_logp=array(top.values) if needs.teacher_topk else None,
        entropy=array(-(teacher.exp() * teacher).sum(-1)) if needs.teacher_entropy else None,
        candidate_logp=array(teacher.gather(1, own)) if more else None,
        tail_logp=array(outside) if needs.tail else None,
    )
    words = tuple(
        Verdict(id=f"{i}@0#{j}", reward=None if v is None else float(v))
        for j, v in enumerate(verdicts)
    )
    from_reference = (
        Scores(id=id, sampled_logp=array(reference.gather(1, at)[:, 0]))
        if needs.reference
        else None
    )
    prompt = Prompt(id=f"{i}@0", ids=ids_L[:prompt_tokens].int().numpy(), answer="")
    return Trajectory(
        prompt=prompt,
        rollout=rollout,
        scores=scores,
        verdicts=words,
        group_lengths=(tokens, 2, 5),
        reference=from_reference,
        group=GROUPS[i],
    )


def packed(objective, *micros):
    """Micro-batches of the trajectories with these numbers."""
    bounds = TrainingBounds(max_lag_steps=3, stale="mask", truncated="mask", cap=8)
    return [
        pack(
            [sample(i, objective.needs()) for i in micro],
            bounds,
            live=4,
            device=torch.device("cpu"),
        )
        for micro in micros
    ]


WHOLE = range(len(TRAJECTORIES))


def accumulated(objective, micros, all_reduce=lambda tensor, op: None, context=CONTEXT):
    """Metrics, running moments and gradients of one rank."""
    module = Tiny()
    found = accumulate(module, lambda loss: loss.backward(), all_reduce, objective, micros, context)
    return *found, [p.grad for p in module.parameters()]


@cache
def whole_batch(objective):
    """All trajectories as the objective sees them in its second pass, and the student that read
    them."""
    (micro,), module = packed(objective, WHOLE), Tiny()
    statistics = batch_statistics(module, lambda tensor, op: None, objective, [micro], CONTEXT)
    return token_batch(micro, module(micro, objective.needs()), CONTEXT, statistics), module


def test_every_objective_has_settings_in_this_file():
    assert set(SETTINGS) == set(all_objectives()), (
        "add the new objective's required settings to SETTINGS"
    )


@every
def test_loss_and_weight_are_one_finite_number_a_token_and_gradients_are_finite(objective):
    batch, module = whole_batch(objective)
    result = objective.loss(batch)
    gradients = torch.autograd.grad(
        result.loss_N.sum(), list(module.parameters()), retain_graph=True
    )
    shape = (len(KEPT),)
    assert result.metrics.keys() == set(objective.metric_names)
    assert result.loss_N.shape == result.weight_N.shape == result.selected_N.shape == shape
    assert (
        result.loss_N.isfinite().all()
        and result.weight_N.isfinite().all()
        and (result.weight_N >= 0).all()
    )
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not any(
        x is not None and x.requires_grad for x in (result.weight_N, result.advantage, result.ratio)
    )


@pytest.mark.parametrize(
    "objective", [o for o in CASES if isinstance(o, Sampled) and not isinstance(o, Eopd)], ids=name
)
def test_the_gradient_is_weight_times_ratio_times_advantage_or_zero_where_clipped(objective):
    batch, _ = whole_batch(objective)
    batch = replace(batch, student_logp_N=batch.student_logp_N.detach().requires_grad_())
    many = batch.student_logp_NK is not None
    if many:
        batch = replace(batch, student_logp_NK=batch.student_logp_NK.detach().requires_grad_())
    leaves = [batch.student_logp_N] + [batch.student_logp_NK] * many
    result = objective.loss(batch)
    got = torch.autograd.grad(-result.loss_N.sum(), leaves)
    got_NM = torch.cat([got[0][:, None], *got[1:]], 1)
    student_NM = torch.cat([leaves[0][:, None], *leaves[1:]], 1).detach()
    behaviour_NM = torch.cat(
        [batch.behaviour_logp_N[:, None]] + [batch.behaviour_logp_NK] * many, 1
    )
    advantage_NM, ratio_NM = (x.reshape(len(KEPT), -1) for x in (result.advantage, result.ratio))
    if isinstance(objective.correction, Ppo):
        rho_NM, clip = (student_NM - behaviour_NM).exp(), objective.correction
        over = torch.where(advantage_NM > 0, rho_NM > 1 + clip.clip, rho_NM < 1 - clip.clip)
        over |= (advantage_NM < 0) & (rho_NM > (clip.dual_clip or torch.inf))
        ratio_NM = rho_NM.where(~over, 0)
    expected_NM = (
        (result.selected_N * result.weight_N)[:, None]
        * ratio_NM
        * advantage_NM
        / student_NM.shape[1]
    )
    torch.testing.assert_close(got_NM, expected_NM)


def forbidden(objective):
    """The batch of all trajectories, where the teacher forbids two tokens and the first of the
    candidates at each position, and the behaviour policy held two others for all but impossible."""
    batch, _ = whole_batch(objective)
    teacher_N, behaviour_N = batch.teacher_logp_N.clone(), batch.behaviour_logp_N.clone()
    teacher_N[[0, 8]], behaviour_N[[1, 8]] = -3000.0, -40.0
    changes = dict(teacher_logp_N=teacher_N, behaviour_logp_N=behaviour_N)
    if batch.teacher_logp_NK is not None:
        teacher_NK = batch.teacher_logp_NK.clone()
        teacher_NK[:, :1] = -3000.0
        changes["teacher_logp_NK"] = teacher_NK
    if batch.behaviour_logp_NK is not None:
        behaviour_NK = batch.behaviour_logp_NK.clone()
        behaviour_NK[2:4, -1:] = -40.0
        changes["behaviour_logp_NK"] = behaviour_NK
    return replace(batch, **changes)


def sizes_N(objective, batch):
    """Σ|∂ℓ/∂log π| of each token."""
    live = [batch.student_logp_N, batch.student_logp_NK, batch.student_tail_logp_N]
    slopes = torch.autograd.grad(
        objective.loss(batch).loss_N.sum(),
        [x for x in live if x is not None],
        allow_unused=True,
        retain_graph=True,
    )
    slopes = [slope for slope in slopes if slope is not None]
    return sum(slope.abs().reshape(len(KEPT), -1).sum(1) for slope in slopes)


@every
@pytest.mark.parametrize(("most", "weight"), [(5.0, 2.0), (0.2, 0.5)])
def test_no_token_carries_a_step_where_signal_and_weight_are_bounded(objective, most, weight):
    bounds = dict(signal_at_most=most, weight_at_most=weight)
    bounded = msgspec.structs.replace(objective, **bounds)
    rewarded = isinstance(objective, McOpd) and objective.reward
    two = isinstance(objective, Eopd) or getattr(objective, "rest", "") == "sampled" or rewarded
    anchored = objective.freshness and objective.freshness.lam and not objective.anchors
    batch, parts = forbidden(objective), 1 + bool(two) + bool(anchored)
    assert sizes_N(bounded, batch).max() <= parts * most * weight * (1 + 1e-6)
    result, signal_only = bounded.loss(batch), msgspec.structs.replace(bounded, weight_at_most=None)
    ratio = 1 if result.ratio is None else result.ratio.reshape(len(KEPT), -1).amax(1)
    assert (result.weight_N * ratio).max() <= weight * (1 + 1e-6)
    if result.advantage is not None:  # of the generated token m times what the reward adds
        advantage = result.advantage[:, 1:] if rewarded else result.advantage
        assert not (advantage.abs() > most).any()
    # those whose factor was lowered are the only ones that a bound on it changes
    lowered, before = result.metrics["weight_bounded"], signal_only.loss(batch)
    assert torch.equal(result.loss_N[~lowered], before.loss_N[~lowered])
    if lowered.any():
        assert (result.weight_N < before.weight_N)[lowered].all()


@every
def test_a_bound_that_never_acts_changes_nothing(objective):
    batch, _ = whole_batch(objective)
    off = msgspec.structs.replace(objective, signal_at_most=None, weight_at_most=None)
    on = msgspec.structs.replace(objective, signal_at_most=1e6, weight_at_most=1e6)
    results = [o.loss(batch) for o in (off, on)]
    assert not any(results[1].metrics[f"{name}_bounded"].any() for name in ("signal", "weight"))
    assert not {"signal_bounded", "weight_bounded"} & results[0].metrics.keys()
    torch.testing.assert_close(results[1].loss_N, results[0].loss_N, atol=1e-12, rtol=1e-12)
    assert torch.equal(results[1].weight_N, results[0].weight_N)
    module = whole_batch(objective)[1]
    gradients = [
        torch.autograd.grad(r.loss_N.sum(), list(module.parameters()), retain_graph=True)
        for r in results
    ]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-6)


@every
def test_neither_order_nor_micro_batches_nor_ranks_matter(objective):
    """All in one micro-batch, or one at a time on two ranks and with an empty one among them."""
    metrics, running, expected = accumulated(objective, packed(objective, WHOLE))
    shares = [packed(objective, [4], [1], [0]), packed(objective, [5], [2], [], [3])]
    both = Ranks(2).run(lambda rank, all_reduce: accumulated(objective, shares[rank], all_reduce))
    for found in both:
        assert found[0] == pytest.approx(metrics, abs=1e-9)
        assert [list(m) for m in found[1].values()] == [
            pytest.approx(list(m)) for m in running.values()
        ]
    added = [a + b for a, b in zip(both[0][2], both[1][2], strict=True)]
    torch.testing.assert_close(added, expected, atol=1e-9, rtol=1e-7)
    assert np.isfinite(metrics["loss"]) and any(
        gradient.abs().max() > 1e-4 for gradient in expected
    )


class Ranks:
    """Threads that stand for ranks: what they reduce is reduced over all of them."""

    def __init__(self, size):
        self._size, self._barrier, self._given = (
            size,
            threading.Barrier(size, timeout=20),
            [None] * size,
        )

    def run(self, work):
        results = [None] * self._size

        def rank(r):
            try:
                results[r] = work(r, lambda tensor, op: self._all_reduce(r, tensor, op))
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=rank, args=(r,)) for r in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _all_reduce(self, rank, tensor, op):
        self._given[rank] = tensor.clone()
        self._barrier.wait()
        stacked = torch.stack(self._given)
        self._barrier.wait()
        tensor.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))


@every
def test_prompts_and_tokens_outside_the_reduction_get_exactly_zero_although_unused_inputs_are_nan(
    objective,
):
    (micro,), (batch, module) = packed(objective, WHOLE), whole_batch(objective)
    assert micro.keep_N.tolist() == KEPT
    result, inputs_LD = objective.loss(batch), module.inputs_LD[-1]
    (gradient_LD,) = torch.autograd.grad(
        result.loss_N[micro.keep_N].sum(), inputs_LD, retain_graph=True
    )
    outside = torch.ones(len(inputs_LD), dtype=bool)
    outside[micro.rows_N[micro.keep_N & result.selected_N]] = False
    assert inputs_LD[outside].isnan().any() and not gradient_LD[outside].any()
    assert gradient_LD[~outside].isfinite().all() and gradient_LD[~outside].any()


@plain
def test_a_step_whose_tokens_all_left_the_reduction_goes_nowhere(objective):
    for composed in COMPOSED:
        composed = msgspec.structs.replace(objective, **composed)
        metrics, _, gradients = accumulated(composed, packed(composed, [4], [5]))
        assert metrics["tokens"] == metrics["loss"] == 0
        assert all(g is None for g in gradients)


@plain
def test_nothing_but_the_student_carries_gradient(objective):
    batch, _ = whole_batch(objective)
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    carrying = {name for name, x in values.items() if torch.is_tensor(x) and x.requires_grad}
    assert carrying <= {
        "student_logp_N",
        "student_logp_NK",
        "student_tail_logp_N",
        "student_entropy_N",
    }
    assert not any(x.requires_grad for x in batch.statistics.values())


@every
def test_where_student_behaviour_and_teacher_agree_nothing_is_learned_unless_it_is_declared(
    objective,
):
    batch, module = whole_batch(objective)
    student_N, student_NK = batch.student_logp_N.detach(), batch.student_logp_NK
    same = dict(behaviour_logp_N=student_N, teacher_logp_N=student_N)
    if student_NK is not None:
        same |= dict(behaviour_logp_NK=student_NK.detach(), teacher_logp_NK=student_NK.detach())
    if batch.student_tail_logp_N is not None:
        same |= dict(teacher_tail_logp_N=batch.student_tail_logp_N.detach())
    batch = replace(batch, **same)
    with torch.no_grad():
        batch = replace(batch, statistics=objective.statistics(batch, torch.tensor(KEPT)))
    loss = objective.loss(batch).loss_N.sum()
    gradients = torch.autograd.grad(
        loss, list(module.parameters()), allow_unused=True, retain_graph=True
    )
    largest = max(0.0 if g is None else g.abs().max().item() for g in gradients)
    learns = LEARNS_FROM_AGREEMENT.get(objective.tag, lambda o: False)(objective)
    learns = learns or bool(getattr(objective, "reward", None))  # from the verdict
    assert (largest > 1e-3) if learns else (largest < 1e-5)


@plain
def test_the_drift_gate_has_mean_one_by_itself_whatever_it_composes_with(objective):
    gated = msgspec.structs.replace(objective, drift_gate=DriftGate(block=2), constant=1.0)
    weights = [
        o.loss(whole_batch(o)[0]).weight_N
        for o in (gated, msgspec.structs.replace(objective, constant=1.0))
    ]
    assert (weights[0] / weights[1])[torch.tensor(KEPT)].mean().item() == pytest.approx(1, abs=1e-5)


def toml(value) -> str:
    """A value as TOML writes it, inline; what is None is left out, as TOML has none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@every
def test_settings_survive_the_trip_through_plain_data_and_through_toml(objective):
    union, data = reduce(or_, all_objectives().values()), msgspec.to_builtins(objective)
    assert msgspec.convert(data, union) == objective
    assert (
        msgspec.convert(tomllib.loads(f"objective = {toml(data)}")["objective"], union) == objective
    )


@plain
def test_an_unknown_setting_is_refused(objective):
    with pytest.raises(msgspec.ValidationError, match="no_such_setting"):
        msgspec.convert(msgspec.to_builtins(objective) | {"no_such_setting": 1}, type(objective))


def test_listing_the_objectives_loads_no_torch():
    program = (
        "import sys, async_opd.objectives as o; o.all_objectives(); sys.exit('torch' in"
        " sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@plain
def test_an_adapter_has_the_metrics_of_its_merged_weights_and_the_gradients_that_follow_from_theirs(
    objective, tiny_lm
):
    """dB = s · G Aᵀ and dA = s · Bᵀ G, where G is the gradient of W + s · B A."""
    micros, results, settings = (
        packed(objective, [0, 2, 4], [1, 3]),
        [],
        LoraConfig(rank=3, alpha=6.0),
    )
    build = dict(vocab_size=V, num_hidden_layers=1, attn_implementation=causal_lm.ATTENTION)
    adapted, merged = (tiny_lm(**build).double() for _ in range(2))
    lora.wrap(adapted, settings, seed=0)
    adapters, weights = lora.adapters(adapted), dict(merged.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.b_OR.copy_(0.2 * torch.randn(adapter.b_OR.shape, generator=generator))
            weights[name] += 2.0 * adapter.b_OR @ adapter.a_RI
    for lm in (adapted, merged):
        module = Student(lm, temperature=1.0)
        backward, reduce = lambda loss: loss.backward(), lambda tensor, op: None
        results.append(accumulate(module, backward, reduce, objective, micros, CONTEXT)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6, abs=1e-9)
    for name, adapter in adapters.items():
        gradient = weights[name].grad
        assert gradient.any()
        for got, expected in (
            (adapter.b_OR.grad, 2.0 * gradient @ adapter.a_RI.T),
            (adapter.a_RI.grad, 2.0 * adapter.b_OR.T @ gradient),
        ):
            torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-5, msg=name)
    assert len(adapters) == 7
    assert all(p.grad is None for p in lora.plain(adapted).values())
