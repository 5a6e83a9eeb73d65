"""What every objective must keep, tested for each file of the folder as soon as it exists."""

import subprocess
import sys
from dataclasses import fields, replace
from functools import reduce
from operator import or_

import msgspec
import pytest
import torch

from async_opd.objectives import all_objectives
from async_opd.objectives.base import TokenBatch

SETTINGS = {  # the required settings of each tag, then those of its other branches
    "opd": [{}, {"truncate": 2.0}],
    "topk_kl": [{"k": 3}, {"k": 3, "divergence": "forward"}, {"k": 3, "divergence": "jensen_shannon", "beta": 0.2}],
}
CASES = [cls(**settings) for tag, cls in all_objectives().items() for settings in SETTINGS.get(tag, [])]
each = pytest.mark.parametrize("objective", CASES, ids=str)
LENGTHS = [4, 1, 6, 3]  # tokens of each trajectory
N, S, V = sum(LENGTHS), len(LENGTHS), 12


def random_batch(objective, seed, *, student=None, behaviour=None, teacher=None):
    """A batch with the fields that `objective` needs and no others, and the logits [N, V] its gradients go to."""
    generator = torch.Generator().manual_seed(seed)
    random_NV = [2 * torch.randn(N, V, generator=generator) for _ in range(3)]
    logits_NV = [
        random if given is None else given
        for given, random in zip((student, behaviour, teacher), random_NV, strict=True)
    ]
    leaf_NV = logits_NV[0].clone().requires_grad_()
    student_NV, behaviour_NV, teacher_NV = (x.log_softmax(-1) for x in (leaf_NV, *logits_NV[1:]))
    ids_N1 = torch.randint(V, (N, 1), generator=generator)
    needs = objective.needs()
    top = teacher_NV.topk(needs.teacher_topk)
    batch = TokenBatch(
        student_logp_N=student_NV.gather(1, ids_N1)[:, 0],
        behaviour_logp_N=behaviour_NV.gather(1, ids_N1)[:, 0],
        teacher_logp_N=teacher_NV.gather(1, ids_N1)[:, 0],
        segment_N=torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS)),
        reward_S=torch.tensor([1.0, 0.0, float("nan"), 1.0]),
        student_logp_NK=student_NV.gather(1, top.indices) if needs.teacher_topk else None,
        teacher_logp_NK=top.values if needs.teacher_topk else None,
        student_entropy_N=-(student_NV.exp() * student_NV).sum(-1) if needs.student_entropy else None,
        teacher_entropy_N=-(teacher_NV.exp() * teacher_NV).sum(-1) if needs.teacher_entropy else None,
    )
    return batch, leaf_NV


def test_every_objective_has_settings_in_this_file():
    assert set(SETTINGS) == set(all_objectives()), "add the new objective's required settings to SETTINGS"


@each
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_weight_are_one_number_a_token_and_gradients_are_finite(objective, seed):
    batch, logits_NV = random_batch(objective, seed)
    result = objective.loss(batch)
    result.loss_N.sum().backward()
    assert result.loss_N.shape == result.weight_N.shape == (N,)
    assert not result.weight_N.requires_grad and result.weight_N.isfinite().all()
    assert result.loss_N.isfinite().all() and logits_NV.grad.isfinite().all() and logits_NV.grad.any()


@each
def test_nothing_is_learned_where_student_behaviour_and_teacher_agree(objective):
    same_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    batch, logits_NV = random_batch(objective, 0, student=same_NV, behaviour=same_NV, teacher=same_NV)
    objective.loss(batch).loss_N.sum().backward()
    torch.testing.assert_close(logits_NV.grad, torch.zeros(N, V), atol=1e-6, rtol=0)


@each
def test_the_order_of_trajectories_does_not_matter(objective):
    batch, _ = random_batch(objective, 0)
    order_S = torch.tensor([2, 0, 3, 1])
    rows_N = torch.cat([torch.nonzero(batch.segment_N == s)[:, 0] for s in order_S])
    whole = ("segment_N", "reward_S", "statistics")
    per_token = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in whole}
    shuffled = replace(
        batch,
        segment_N=torch.argsort(order_S)[batch.segment_N[rows_N]],
        reward_S=batch.reward_S[order_S],
        **{name: x if x is None else x[rows_N] for name, x in per_token.items()},
    )
    torch.testing.assert_close(objective.loss(shuffled).loss_N, objective.loss(batch).loss_N[rows_N])


@each
def test_the_teacher_and_the_behaviour_policy_get_no_gradient(objective):
    batch, _ = random_batch(objective, 0)
    fixed = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name.startswith(("teacher", "behaviour"))}
    leaves = {name: x.clone().requires_grad_() for name, x in fixed.items() if x is not None}
    loss = objective.loss(replace(batch, **leaves)).loss_N.sum()
    sampled = [leaves["teacher_logp_N"], leaves["behaviour_logp_N"]]
    assert torch.autograd.grad(loss, sampled, allow_unused=True) == (None, None)


@each
def test_settings_survive_the_trip_through_plain_data(objective):
    union = reduce(or_, all_objectives().values())
    assert msgspec.convert(msgspec.to_builtins(objective), union) == objective


@each
def test_an_unknown_setting_is_refused(objective):
    with pytest.raises(msgspec.ValidationError, match="no_such_setting"):
        msgspec.convert(msgspec.to_builtins(objective) | {"no_such_setting": 1}, type(objective))


def test_listing_the_objectives_loads_no_torch():
    program = "import sys, async_opd.objectives as o; o.all_objectives(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
