"""From groups and scores to packed micro-batches of tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from async_opd.errors import StaleTrajectory, WireError
from async_opd.maths import lag
from async_opd.wire import Prompt, Rollout, Scores, Verdict


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trajectory as it reaches a learner rank."""

    prompt: Prompt
    rollout: Rollout
    scores: Scores
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Trajectories packed along one row, response positions selected: `L` packed tokens, `N` response tokens."""

    ids_L: Tensor  # int64
    segment_lengths: list[int]  # prompt + response of each trajectory, summing to L
    rows_N: Tensor  # int64, index in L of the position that predicts each response token
    targets_N: Tensor  # int64
    keep_N: Tensor  # bool, tokens inside the reduction
    lag_N: Tensor  # int64, optimizer steps
    segment_N: Tensor  # int64
    behaviour_logp_N: Tensor
    teacher_logp_N: Tensor
    reward_S: Tensor  # NaN: unknown
    candidate_ids_NK: Tensor | None
    teacher_logp_NK: Tensor | None
    teacher_entropy_N: Tensor | None


def pack(
    samples: list[Sample], *, live: int, max_lag_steps: int, stale: str, truncated: str, device: torch.device
) -> MicroBatch:
    """Pack `samples` (possibly none: such a micro-batch still joins every collective) under live version `live`.

    `stale` and `truncated` say "mask" where such tokens stay visible to the objective but leave the reduction.
    Raises StaleTrajectory for a token over the bound where the policy is "drop": the queue must not have let it by.
    Raises WireError where scores and rollout do not belong together.
    """
    for s in samples:
        found = {s.scores.id, s.verdict.id}
        if found != {s.rollout.id} or len(s.scores.sampled_logp) != len(s.rollout.ids):
            raise WireError(f"{s.rollout.id}: paired with {found}, {len(s.scores.sampled_logp)} scores")
    versions = [s.rollout.versions() for s in samples]
    fresh = [lag.fresh(v, live, max_lag_steps) for v in versions]
    if stale == "drop":
        for s, ok in zip(samples, fresh, strict=True):
            if not ok.all():
                raise StaleTrajectory(f"{s.rollout.id}: {s.rollout.spans} at version {live}, bound {max_lag_steps}")
    keep = [ok & (truncated != "mask" or not s.rollout.truncated) for s, ok in zip(samples, fresh, strict=True)]
    ids = [np.concatenate([s.prompt.ids, s.rollout.ids]) for s in samples] or [np.zeros(1, np.int32)]
    starts = np.cumsum([0, *map(len, ids)])
    rows = [at + len(s.prompt.ids) - 1 + np.arange(len(s.rollout.ids)) for at, s in zip(starts, samples, strict=False)]

    def flat(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0), dtype=dtype, device=device)

    def optional(parts: list[np.ndarray | None], dtype: torch.dtype) -> Tensor | None:
        return None if not parts or parts[0] is None else flat(parts, dtype)

    scores = [s.scores for s in samples]
    return MicroBatch(
        ids_L=flat(ids, torch.int64),
        segment_lengths=[len(part) for part in ids],
        rows_N=flat(rows, torch.int64),
        targets_N=flat([s.rollout.ids for s in samples], torch.int64),
        keep_N=flat(keep, torch.bool),
        lag_N=flat([live - v for v in versions], torch.int64),
        segment_N=flat([np.full(len(s.rollout.ids), i) for i, s in enumerate(samples)], torch.int64),
        behaviour_logp_N=flat([s.rollout.behaviour_logp for s in samples], torch.float32),
        teacher_logp_N=flat([s.sampled_logp for s in scores], torch.float32),
        reward_S=torch.tensor(
            [float("nan") if s.verdict.correct is None else float(s.verdict.correct) for s in samples], device=device
        ),
        candidate_ids_NK=optional([s.topk_ids for s in scores], torch.int64),
        teacher_logp_NK=optional([s.topk_logp for s in scores], torch.float32),
        teacher_entropy_N=optional([s.entropy for s in scores], torch.float32),
    )
