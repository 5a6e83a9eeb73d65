"""From groups and scores to packed micro-batches of tensors."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from async_opd.core.errors import StaleTrajectory, WireError
from async_opd.core.wire import Group, Prompt, Rollout, Scores, Verdict
from async_opd.maths import lag


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trajectory as it reaches a learner rank."""

    prompt: Prompt
    rollout: Rollout
    scores: Scores | None  # None: the teacher's own answer
    verdicts: tuple[Verdict, ...]  # of all samples of the prompt, its own among them
    reference: Scores | None = None


def samples(
    plan: list[list[tuple[int, int]]], verdicts: list[tuple[Verdict, ...]], data: tuple
) -> list[list[Sample]]:
    """Of each micro-batch of `plan`, pairs of (index of group, sample); `data` as in
    `LearnerRank.step`."""
    count = len(verdicts)
    groups: tuple[Group, ...] = data[:count]
    scores: tuple[tuple[Scores, ...] | None, ...] = data[count : 2 * count]
    references: tuple[tuple[Scores, ...] | None, ...] = data[2 * count :] or (None,) * count
    return [
        [
            Sample(
                prompt=groups[g].prompt,
                rollout=groups[g].rollouts[s],
                scores=scores[g] and scores[g][s],
                verdicts=verdicts[g],
                reference=references[g] and references[g][s],
            )
            for g, s in pairs
        ]
        for pairs in plan
    ]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Trajectories packed along one row, response positions selected: `L` packed tokens, `N`
    response tokens."""

    ids_L: Tensor  # int64
    segment_lengths: list[int]  # prompt + response of each trajectory, summing to L
    rows_N: Tensor  # int64, index in L of the position that predicts each response token
    targets_N: Tensor  # int64
    keep_N: Tensor  # bool, tokens inside the reduction
    lag_N: Tensor  # int64, optimizer steps
    segment_N: Tensor  # int64
    behaviour_logp_N: Tensor
    teacher_logp_N: Tensor
    key_S: Tensor  # int64, names the trajectory
    reward_S: Tensor  # NaN: unknown
    group_reward_SG: Tensor  # of all samples of the prompt
    cap_S: Tensor  # most tokens a response may have
    candidate_ids_NK: Tensor | None
    behaviour_logp_NK: Tensor | None
    teacher_logp_NK: Tensor | None
    teacher_tail_logp_N: Tensor | None
    teacher_entropy_N: Tensor | None
    reference_logp_N: Tensor | None
    taught: bool  # all of them the teacher's own answers: no lag, no scores, cross-entropy


def pack(
    samples: list[Sample],
    *,
    live: int,
    max_lag_steps: int,
    stale: str,
    truncated: str,
    cap: int,
    device: torch.device,
) -> MicroBatch:
    """Pack `samples` (possibly none: such a micro-batch still joins every collective) under live
    version `live`.

    `stale` and `truncated` say "mask" where such tokens stay visible to the objective but leave the
    reduction. Raises StaleTrajectory for a token over the bound where the policy is "drop": the
    queue must not have let it by. Raises WireError where scores and rollout do not belong together,
    or answers of teacher and student come together.
    """
    taught = any(s.prompt.taught for s in samples)
    scores = [_scores(s) for s in samples]
    for s, given in zip(samples, scores, strict=True):
        found = {given.id, *([s.reference.id] if s.reference else [])}
        decided = {v.id for v in s.verdicts}
        if (
            found != {s.rollout.id}
            or s.rollout.id not in decided
            or len(given.sampled_logp) != len(s.rollout.ids)
        ):
            raise WireError(
                f"{s.rollout.id}: paired with {found | decided}, {len(given.sampled_logp)} scores"
            )
        if s.prompt.taught != taught:
            raise WireError(
                f"{s.rollout.id}: packed with answers of"
                f" {'the teacher' if taught else 'the student'}"
            )
    versions = [
        np.full(len(s.rollout.ids), live) if taught else s.rollout.versions() for s in samples
    ]
    fresh = [lag.fresh(v, live, max_lag_steps) for v in versions]
    if stale == "drop":
        for s, ok in zip(samples, fresh, strict=True):
            if not ok.all():
                raise StaleTrajectory(
                    f"{s.rollout.id}: {s.rollout.spans} at version {live}, bound {max_lag_steps}"
                )
    keep = [
        ok & (truncated != "mask" or not s.rollout.truncated)
        for s, ok in zip(samples, fresh, strict=True)
    ]
    ids = [np.concatenate([s.prompt.ids, s.rollout.ids]) for s in samples] or [
        np.zeros(1, np.int32)
    ]
    starts = np.cumsum([0, *map(len, ids)])
    rows = [
        at + len(s.prompt.ids) - 1 + np.arange(len(s.rollout.ids))
        for at, s in zip(starts, samples, strict=False)
    ]

    def flat(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(
            np.concatenate(parts) if parts else np.zeros(0), dtype=dtype, device=device
        )

    def optional(parts: list[np.ndarray | None], dtype: torch.dtype) -> Tensor | None:
        return None if not parts or parts[0] is None else flat(parts, dtype)

    own = not samples or scores[0].topk_ids is None
    candidates = [s.rollout.candidate_ids for s in samples] if own else [s.topk_ids for s in scores]
    rewards = [[_reward(v) for v in s.verdicts] for s in samples]
    return MicroBatch(
        ids_L=flat(ids, torch.int64),
        segment_lengths=[len(part) for part in ids],
        rows_N=flat(rows, torch.int64),
        targets_N=flat([s.rollout.ids for s in samples], torch.int64),
        keep_N=flat(keep, torch.bool),
        lag_N=flat([live - v for v in versions], torch.int64),
        segment_N=flat(
            [np.full(len(s.rollout.ids), i) for i, s in enumerate(samples)], torch.int64
        ),
        behaviour_logp_N=flat([s.rollout.behaviour_logp for s in samples], torch.float32),
        teacher_logp_N=flat([s.sampled_logp for s in scores], torch.float32),
        key_S=torch.tensor(
            [zlib.crc32(s.rollout.id.encode()) for s in samples], dtype=torch.int64, device=device
        ),
        reward_S=torch.tensor(
            [_reward(v) for s in samples for v in s.verdicts if v.id == s.rollout.id], device=device
        ),
        group_reward_SG=torch.tensor(rewards, device=device).reshape(
            len(samples), -1 if samples else 0
        ),
        cap_S=torch.full((len(samples),), float(cap), device=device),
        candidate_ids_NK=optional(candidates, torch.int64),
        behaviour_logp_NK=optional([s.rollout.candidate_logp for s in samples], torch.float32),
        teacher_logp_NK=optional(
            [s.candidate_logp if own else s.topk_logp for s in scores], torch.float32
        ),
        teacher_tail_logp_N=optional([s.tail_logp for s in scores], torch.float32),
        teacher_entropy_N=optional([s.entropy for s in scores], torch.float32),
        reference_logp_N=optional(
            [s.reference and s.reference.sampled_logp for s in samples], torch.float32
        ),
        taught=taught,
    )


def _scores(sample: Sample) -> Scores:
    """The teacher's scores; of its own answer, what it was sampled with."""
    if sample.scores is not None:
        return sample.scores
    return Scores(id=sample.rollout.id, sampled_logp=sample.rollout.behaviour_logp)


def _reward(verdict: Verdict) -> float:
    return float("nan") if verdict.correct is None else float(verdict.correct)
