"""Batches by hand and their statistics, in float64, for tests that compare with formulas."""

from dataclasses import replace

import torch

from async_opd.objectives.token_batch import TokenBatch

# six tokens that the numbers of several methods are known for
STUDENT = [-0.10, -1.20, -0.05, -2.30, -0.40, -0.02]
TEACHER = [-0.15, -0.70, -3.05, -2.80, -0.40, -0.01]
REFERENCE = [-0.12, -1.10, -0.30, -2.10, -0.50, -0.02]
NAN = float("nan")


def batch(
    student,
    teacher,
    *,
    behaviour=None,
    lengths=None,
    reward=None,
    group=None,
    group_lengths=None,
    cap=10.0,
    lag=None,
    number=None,
    **more,
):
    """A batch from lists; one trajectory unless `lengths` are given, no staleness unless
    `behaviour` is."""
    lengths = lengths or [len(student)]
    reward = reward or [NAN] * len(lengths)
    tensors = {
        name: x if isinstance(x, (int, dict)) else torch.as_tensor(x, dtype=torch.float64)
        for name, x in more.items()
    }
    return TokenBatch(
        student_logp_N=torch.tensor(student, dtype=torch.float64, requires_grad=True),
        behaviour_logp_N=torch.tensor(behaviour or student, dtype=torch.float64),
        teacher_logp_N=torch.tensor(teacher, dtype=torch.float64),
        segment_N=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        key_S=torch.arange(len(lengths)),
        reward_S=torch.tensor(reward, dtype=torch.float64),
        group_reward_SG=torch.tensor(group or [[r] for r in reward], dtype=torch.float64),
        group_length_SG=torch.tensor(group_lengths or [[n] for n in lengths], dtype=torch.float64),
        cap_S=torch.full((len(lengths),), cap, dtype=torch.float64),
        targets_N=torch.zeros(len(student), dtype=torch.int64),
        lag_N=torch.tensor(lag or [0] * len(student)),
        group_S=torch.tensor(number or [0] * len(lengths)),
        groups=max(number or [0]) + 1,
        **tensors,
    )


LENGTHS = [5, 1, 7, 3, 2]
# two stale tokens; the last rollout is truncated
KEPT = [True] * 2 + [False] + [True] * 12 + [False] + [False] * 2


def ragged(seed, **more):
    """Five trajectories of random log-probs, among them one of unknown verdict and one whose group
    is all right."""
    generator = torch.Generator().manual_seed(seed)
    student, behaviour, teacher, reference = (
        -3 * torch.rand(4, sum(LENGTHS), generator=generator) - 0.01
    ).tolist()
    entropies = 4 * torch.rand(2, sum(LENGTHS), generator=generator)
    return batch(
        student,
        teacher,
        behaviour=behaviour,
        lengths=LENGTHS,
        reward=[1.0, 0.0, 1.0, NAN, 0.0],
        group=[[1, 0, NAN], [1, 0, NAN], [1, 1, 1], [NAN, 1, 0], [0, 1, 1]],
        group_lengths=[[5, 1, 9], [5, 1, 9], [4, 7, 2], [3, 8, 1], [2, 6, 6]],
        reference_logp_N=reference,
        student_entropy_N=entropies[0],
        teacher_entropy_N=entropies[1],
        **more,
    )


def with_candidates(batch, student_NV, teacher_NV, ids_NK):
    """The batch with the log-probs of some ids of the vocabulary, and the log-mass of all
    others."""

    def outside_N(logp_NV):
        return logp_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)

    return replace(
        batch,
        student_logp_NK=student_NV.gather(1, ids_NK),
        teacher_logp_NK=teacher_NV.gather(1, ids_NK),
        student_tail_logp_N=outside_N(student_NV),
        teacher_tail_logp_N=outside_N(teacher_NV),
    )


def rows(batch, *names):
    """The tokens' values as lists, one of tuples for each trajectory."""
    columns = list(zip(*(getattr(batch, name).tolist() for name in names), strict=True))
    return [
        [columns[n] for n in range(len(columns)) if batch.segment_N[n] == s]
        for s in range(batch.trajectories)
    ]


def with_statistics(objective, batch, kept=None):
    """The batch with what the learner reduces over the `kept` tokens of a whole step, which this is
    (all: None)."""
    kept_N = torch.ones(len(batch.segment_N), dtype=bool) if kept is None else torch.tensor(kept)
    with torch.no_grad():
        return replace(batch, statistics=objective.statistics(batch, kept_N))


def coefficients(objective, batch):
    """-∂Σℓ/∂log π of each sampled token: positive makes it likelier."""
    (gradient_N,) = torch.autograd.grad(objective.loss(batch).loss_N.sum(), batch.student_logp_N)
    return (-gradient_N).tolist()
